"""Exponential moving average of a model's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from snapfusion.training.fsdp import distribute_like


class Ema:
    """avg <- d avg + (1 - d) theta after every step, in float32.

    d = min(decay, (1 + step) / (10 + step)), so that a short run forgets its initial weights. The warm-up is
    ours: the paper mentions no averaging.

    Args:
        model: gives the initial values.
        decay: the limit of d, between 0 and 1.

    Raises:
        ValueError: if `decay` is out of range.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay is {decay}; a number between 0 and 1 is needed")
        self.decay = decay
        # float32 whatever the model's dtype: with d near 1 a step is below the resolution of bfloat16.
        self.averages: dict[str, Tensor] = {
            name: tensor.detach().float().clone() if tensor.is_floating_point() else tensor.detach().clone()
            for name, tensor in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Average in the weights after step `step`, counted from 1; integer tensors are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            average = self.averages[name]
            if average.is_floating_point():
                average.lerp_(tensor.float(), 1.0 - decay)
            else:
                average.copy_(tensor)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            ValueError: if their names or shapes differ from the model's.
        """
        if {n: t.shape for n, t in averages.items()} != {n: t.shape for n, t in self.averages.items()}:
            raise ValueError("the saved averages are those of another model")
        for name, average in self.averages.items():
            average.copy_(distribute_like(averages[name], average))
