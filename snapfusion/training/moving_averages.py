"""Moving averages of what rows are worth, whole and by part, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class MovingAverages:
    """For each name a moving average over steps, and one for each of `parts` kinds of rows.

    The rows of a step count alike, however they are spread over ranks and forward passes. The first n steps
    that have such rows give their plain mean, until 1/n falls to 1 - decay.

    Args:
        names: what is averaged.
        parts: kinds of rows.
        decay: of the older average at each step that has such rows.
        across_ranks: whether the rows of all ranks count, which must then all call; else this one's alone.
    """

    def __init__(self, names: Sequence[str], *, parts: int, decay: float, across_ranks: bool = True) -> None:
        self._across_ranks = across_ranks
        self._rows = {name: row for row, name in enumerate(names)}
        self._parts, self._decay = parts, decay
        self._means = torch.zeros(len(names), parts + 1, dtype=torch.float64)
        self._steps = torch.zeros(len(names), parts + 1, dtype=torch.float64)
        self._sums: Tensor | None = None

    def add(self, name: str, values: Tensor, *, part: Tensor) -> None:
        """Count in rows of the present step: values [B], and the kind of each, int64 [B]."""
        if self._sums is None:
            self._sums = torch.zeros(2, *self._means.shape, dtype=torch.float64, device=values.device)
        values = values.detach().double()
        sums = self._sums[:, self._rows[name]]
        sums[0].index_add_(0, part, values)
        sums[1].index_add_(0, part, torch.ones_like(values))
        sums[:, -1] += torch.stack([values.sum(), torch.tensor(float(len(values)), device=values.device)])

    def end_step(self) -> None:
        """Move the averages on by the rows of the step."""
        if self._sums is None:
            return
        if self._across_ranks and dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        total, count = self._sums.cpu()
        self._steps += count > 0
        share = (1.0 / self._steps.clamp(min=1.0)).clamp(min=1.0 - self._decay)
        moved = self._means + share * (total / count.clamp(min=1.0) - self._means)
        self._means = torch.where(count > 0, moved, self._means)
        self._sums = None

    def whole(self, name: str) -> float | None:
        """The average over all rows, or None before the first."""
        return self._at(name, self._parts)

    def of_part(self, name: str, part: int) -> float | None:
        """The average over rows of one kind, or None before the first."""
        return self._at(name, part)

    def _at(self, name: str, place: int) -> float | None:
        row = self._rows[name]
        return float(self._means[row, place]) if self._steps[row, place] else None

    def values(self) -> dict[str, Any]:
        """The averages between two steps, as JSON values."""
        return {"names": list(self._rows), "means": self._means.tolist(), "steps": self._steps.tolist()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what `values` gave.

        Raises:
            ValueError: if they are of other names or parts.
        """
        means = torch.tensor(values["means"], dtype=torch.float64)
        if values["names"] != list(self._rows) or means.shape != self._means.shape:
            raise ValueError("the saved averages are of other names or parts")
        self._means, self._steps = means, torch.tensor(values["steps"], dtype=torch.float64)
