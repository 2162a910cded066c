"""Moving averages of per-row values, overall and by group, equal on all ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class MovingAverages:
    """For each name a moving average over steps, and one for each of `groups` groups of rows.

    All rows of a step have equal weight, however they are split over ranks and forward passes. The average
    over the first n steps is the plain mean, until 1/n falls to 1 - decay.

    Args:
        names: names of the averages.
        groups: number of groups.
        decay: weight of the earlier average at each step that has rows of the group.
        across_ranks: whether to average over all ranks, which must then all call; else over this one.
    """

    def __init__(self, names: Sequence[str], *, groups: int, decay: float, across_ranks: bool = True) -> None:
        self._across_ranks = across_ranks
        self._rows = {name: row for row, name in enumerate(names)}
        self._decay = decay
        # The last column is the average over all groups.
        self._means = torch.zeros(len(names), groups + 1, dtype=torch.float64)
        self._steps = torch.zeros(len(names), groups + 1, dtype=torch.float64)
        self._sums: Tensor | None = None

    def add(self, name: str, values: Tensor, *, group: Tensor) -> None:
        """Add rows of the current step: values [B], and the group of each, int64 [B]."""
        if self._sums is None:
            self._sums = torch.zeros(2, *self._means.shape, dtype=torch.float64, device=values.device)
        # The sums stay on the device until the end of the step: reading them would synchronize every pass.
        values = values.detach().double()
        sums = self._sums[:, self._rows[name]]
        sums[0].index_add_(0, group, values)
        sums[1].index_add_(0, group, torch.ones_like(values))
        sums[:, -1] += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def end_step(self) -> None:
        """Update the averages with the rows of the step."""
        if self._sums is None:
            return
        if self._across_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        total, count = self._sums.cpu()
        self._steps += count > 0
        weight = (1.0 / self._steps.clamp(min=1.0)).clamp(min=1.0 - self._decay)
        updated = self._means + weight * (total / count.clamp(min=1.0) - self._means)
        self._means = torch.where(count > 0, updated, self._means)
        self._sums = None

    def get(self, name: str, group: int = -1) -> float | None:
        """Return the average over one group, by default over all rows; None before its first row."""
        row = self._rows[name]
        return float(self._means[row, group]) if self._steps[row, group] else None

    def state_dict(self) -> dict[str, Any]:
        """Return the averages between two steps, as JSON values."""
        return {"names": list(self._rows), "means": self._means.tolist(), "steps": self._steps.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if the names or the number of groups differ.
        """
        means = torch.tensor(state["means"], dtype=torch.float64)
        if state["names"] != list(self._rows) or means.shape != self._means.shape:
            raise ValueError("the saved averages have other names or another number of groups")
        self._means, self._steps = means, torch.tensor(state["steps"], dtype=torch.float64)
