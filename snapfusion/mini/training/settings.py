"""The settings of the miniature's training."""

from __future__ import annotations

from pydantic import Field

from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import Settings


class StageSettings(Settings):
    """One stage: AdamW with a warm-up and a cosine decay to zero."""

    samples: int = Field(gt=0, description="pictures seen; rounded up to whole batches")
    batch: int = Field(gt=0, le=NUM_CAPTIONS, description="pictures a step, all of different captions")
    lr: float = Field(gt=0, description="the highest learning rate")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.samples // self.batch)


class DenoiserSettings(StageSettings):
    """A stage of the UNet, which learns to read the caption in its depth before it may read it elsewhere.

    Trained plainly, the miniature reads captions at 8x8 alone and its middle stays idle: its pictures are
    simple enough. SD-v1.5's are not, and evolving an architecture (SnapFusion Sec. 3.1) needs blocks that
    matter.
    """

    deep_first: float = Field(
        ge=0, le=1, description="share of the steps, at the start, in which only the middle reads the caption"
    )
    shallow_skip: float = Field(
        ge=0, le=1, description="afterwards, how often cross-attention above a random depth is left out"
    )


class MiniTraining(Settings):
    """The whole recipe. The defaults take a little over an hour on one core."""

    seed: int = Field(default=0, ge=0, description="what every random choice of the training follows from")
    checkpoint_every: int = Field(default=200, gt=0, description="steps between two checkpoints of a stage")
    autoencoder: StageSettings = StageSettings(samples=60_000, batch=16, lr=2e-3)
    decoder: StageSettings = StageSettings(samples=40_000, batch=16, lr=1e-3)
    text: StageSettings = StageSettings(samples=30_000, batch=64, lr=2e-3)
    scorer: StageSettings = StageSettings(samples=40_000, batch=64, lr=2e-3)
    oracle: StageSettings = StageSettings(samples=30_000, batch=64, lr=2e-3)
    denoiser: DenoiserSettings = DenoiserSettings(
        samples=720_000, batch=96, lr=1.2e-3, deep_first=0.35, shallow_skip=0.4
    )
    velocity: DenoiserSettings = DenoiserSettings(
        samples=240_000, batch=96, lr=6e-4, deep_first=0.0, shallow_skip=0.4
    )
    scenes: int = Field(default=60_000, gt=0, description="scenes whose latents the UNets are trained on")
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="how often a UNet sees the empty caption instead"
    )
