"""Exponential moving average of a model's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from snapfusion.training.fsdp import distribute_like


class Ema:
    """avg <- d avg + (1 - d) theta after every step, in float32. The paper mentions no averaging.

    d is the `decay`, corrected for the first steps: the weights after step n - i have the share decay^i over
    the steps of the run, and the initial weights have none, as in Adam's bias correction. So a run that is
    shorter than 1 / (1 - decay) averages all its steps.

    Args:
        model: gives the initial values.
        decay: between 0 and 1.
        of_run: average over the steps of the run; else d = min(decay, (1 + step) / (10 + step)), as version
            0.1 did, which never reaches the decay in a run of fewer than 9 / (1 - decay) steps.
        module: a copy of `model`, in float32, whose weights are to be the averages; None if no pass needs
            them.

    Raises:
        ValueError: if `decay` is out of range.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, of_run: bool = True, module: nn.Module | None = None
    ) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay is {decay}; a number between 0 and 1 is needed")
        self.decay, self._of_run = decay, of_run
        self.module = None if module is None else module.eval().requires_grad_(requires_grad=False)
        # float32 whatever the model's dtype: with d near 1 a step is below the resolution of bfloat16.
        self.averages: dict[str, Tensor] = {
            name: tensor.detach().float().clone() if tensor.is_floating_point() else tensor.detach().clone()
            for name, tensor in model.state_dict().items()
        }
        if module is not None:
            # These share their memory with the module, and an update changes them in place.
            module.load_state_dict(self.averages)
            self.averages = dict(module.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Average in the weights after step `step`, counted from 1; integer tensors are copied."""
        averages, weights = list[Tensor](), list[Tensor]()
        for name, tensor in model.state_dict().items():
            average = self.averages[name]
            if average.is_floating_point():
                averages.append(average)
                weights.append(tensor.float())
            else:
                average.copy_(tensor)
        torch._foreach_lerp_(averages, weights, 1.0 - self._decay_at(step))

    def _decay_at(self, step: int) -> float:
        """d after step `step`."""
        if not self._of_run:
            return min(self.decay, (1 + step) / (10 + step))
        return self.decay * (1.0 - self.decay ** (step - 1)) / (1.0 - self.decay**step)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            ValueError: if their names or shapes differ from the model's.
        """
        if {n: t.shape for n, t in averages.items()} != {n: t.shape for n, t in self.averages.items()}:
            raise ValueError("the saved averages are those of another model")
        for name, average in self.averages.items():
            average.copy_(distribute_like(averages[name], average))
