"""Robust training: random blocks are skipped, the same ones for a whole batch. SnapFusion Eq. 5."""

from collections.abc import Iterable

from torch import Tensor, nn

from snapfusion.models.architecture import Block
from snapfusion.models.blocks import blocks_of, set_skipped_blocks
from snapfusion.noise import noise_key, uniform
from snapfusion.training.batch import Batch
from snapfusion.training.loop import Objective
from snapfusion.training.row_draws import draw_rows
from snapfusion.training.settings import SkipSettings


class RobustObjective:
    """Evaluates another objective on a UNet that skips other blocks in each step.

    The skipped blocks follow from the seed and the step, so all ranks and all pieces of a batch skip the
    same. They get no gradient, and the optimizer leaves them unchanged.

    Args:
        objective: the loss to minimise.
        settings: skip probabilities.
        seed: of the draws.
    """

    def __init__(self, objective: Objective, *, settings: SkipSettings, seed: int) -> None:
        self._objective, self._settings, self._seed = objective, settings, seed

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `DrawingObjective.draw`, of the other objective."""
        return draw_rows(self._objective, batch, step=step)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]."""
        unet = getattr(model, "module", model)  # inside DistributedDataParallel; an FSDP module is itself
        # Not reset after the loss: gradient checkpointing recomputes activations in the backward pass, with
        # the same blocks skipped. `set_skipped_blocks(unet, ())` restores the UNet.
        skipped = draw_skipped_blocks(blocks_of(unet), settings=self._settings, seed=self._seed, step=step)
        set_skipped_blocks(unet, skipped)
        return self._objective(model, batch, step=step)


def draw_skipped_blocks(
    blocks: Iterable[Block], *, settings: SkipSettings, seed: int, step: int
) -> list[str]:
    """Draw the names of the blocks that a step skips. SnapFusion Eq. 5, I(.).

    Each draw follows from the block's own name, so adding or removing a block does not change the others.
    """
    p = {"attention": settings.attention, "resnet": settings.resnet}
    return [
        block.name
        for block in blocks
        if uniform(noise_key("skip", seed, step, block.name), 1)[0] < p[block.kind]
    ]
