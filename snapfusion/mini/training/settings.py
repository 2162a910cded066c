"""The settings of the miniature's training."""

from __future__ import annotations

from pydantic import Field

from snapfusion.mini.scenes import NUM_CAPTIONS
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


class MiniTraining(Settings):
    """The whole recipe. The defaults take a little over an hour on one core."""

    seed: int = Field(default=0, ge=0, description="what every random choice of the training follows from")
    checkpoint_every: int = Field(default=200, gt=0, description="steps between two checkpoints of a stage")
    autoencoder: StageSettings = StageSettings(samples=60_000, batch=16, lr=2e-3)
    decoder: StageSettings = StageSettings(samples=40_000, batch=16, lr=1e-3)
    text: StageSettings = StageSettings(samples=30_000, batch=64, lr=2e-3)
    scorer: StageSettings = StageSettings(samples=40_000, batch=64, lr=2e-3)
    oracle: StageSettings = StageSettings(samples=30_000, batch=64, lr=2e-3)
    denoiser: StageSettings = StageSettings(samples=440_000, batch=96, lr=1.2e-3)
    scenes: int = Field(default=60_000, gt=0, description="scenes whose latents the denoiser is trained on")
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="how often the denoiser sees the empty caption instead"
    )
