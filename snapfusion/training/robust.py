"""Robust training: each block is left out at random, for a whole batch at a time. SnapFusion Eq. 5."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snapfusion.models.architecture import Block
from snapfusion.models.blocks import blocks_of, set_skipped_blocks
from snapfusion.models.unet import BlockUNet
from snapfusion.noise import noise_key, uniform
from snapfusion.training.batch import Batch
from snapfusion.training.loop import Objective
from snapfusion.training.settings import SkipSettings


class RobustObjective:
    """Another objective, of a UNet that lacks other blocks in each step.

    They follow from the seed and the step, so all ranks and all pieces of a batch lack the same. The
    optimizer leaves alone what was left out. Blocks stay left out until the next step, as activations that
    are computed again in the backward pass must be what they were; `set_skipped_blocks(unet, ())` makes the UNet whole.

    Args:
        objective: what is minimised.
        settings: how often.
        seed: of the draws.
    """

    def __init__(self, objective: Objective, *, settings: SkipSettings, seed: int) -> None:
        self._objective, self._settings, self._seed = objective, settings, seed

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """The loss of each row, float32 [B]."""
        unet = _unwrap(model)
        set_skipped_blocks(
            unet, draw_skipped_blocks(blocks_of(unet), settings=self._settings, seed=self._seed, step=step)
        )
        return self._objective(model, batch, step=step)


def draw_skipped_blocks(
    blocks: Iterable[Block], *, settings: SkipSettings, seed: int, step: int
) -> list[str]:
    """The names of the blocks that a step goes without. SnapFusion Eq. 5, I(.).

    Each block's fate follows from its own name, so blocks that come or go change nothing for the others.
    """
    p = {"attention": settings.attention, "resnet": settings.resnet}
    return [
        block.name
        for block in blocks
        if uniform(noise_key("skip", seed, step, block.name), 1)[0] < p[block.kind]
    ]


def _unwrap(model: nn.Module) -> UNet2DConditionModel | BlockUNet:
    """The UNet inside of DistributedDataParallel; one that is spread (FSDP) is itself."""
    return getattr(model, "module", model)
