"""Settings of the miniature's training."""

from typing import Self

from pydantic import Field, model_validator

from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import Settings


class StageSettings(Settings):
    """Settings of one stage, which uses AdamW with a warm-up and a cosine decay to zero."""

    samples: int = Field(gt=0, description="images of the training; rounded up to whole batches")
    batch: int = Field(gt=0, le=NUM_CAPTIONS, description="images per step, all of different captions")
    lr: float = Field(gt=0, description="the highest learning rate")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.samples // self.batch)


class DenoiserSettings(StageSettings):
    """Settings of a UNet's stage, in which shallow cross-attention is skipped at times.

    With plain training the miniature uses captions at 8x8 only and its middle stays idle, because its images
    are simple. Evolving an architecture (SnapFusion Sec. 3.1) needs blocks that matter, as SD-v1.5's do.
    """

    deep_first: float = Field(
        ge=0, le=1, description="fraction of the steps, at the start, with cross-attention in the middle only"
    )
    shallow_skip: float = Field(
        ge=0, le=1, description="probability afterwards that cross-attention above a random depth is skipped"
    )


class CaptionNoiseSettings(Settings):
    """Settings of the captions in the noisy stages.

    Attributes:
        wrong_word: share of captions with the value of one attribute replaced by another.
        missing_word: share of captions with one attribute left out.
    """

    wrong_word: float = Field(default=0.12, ge=0, le=1)
    missing_word: float = Field(default=0.12, ge=0, le=1)

    @model_validator(mode="after")
    def _are_shares(self) -> Self:
        if self.wrong_word + self.missing_word > 1:
            raise ValueError("wrong_word and missing_word are shares: at most 1 together")
        return self


class MiniTraining(Settings):
    """Settings of the whole training. The defaults take a little over an hour on one core."""

    seed: int = Field(default=0, ge=0, description="of all random choices")
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
    noisy_denoiser: DenoiserSettings = DenoiserSettings(
        samples=144_000, batch=96, lr=6e-4, deep_first=0.0, shallow_skip=0.4
    )
    noisy_velocity: DenoiserSettings = DenoiserSettings(
        samples=144_000, batch=96, lr=6e-4, deep_first=0.0, shallow_skip=0.4
    )
    caption_noise: CaptionNoiseSettings = CaptionNoiseSettings()
    scenes: int = Field(default=60_000, gt=0, description="scenes whose latents the UNets are trained on")
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="probability that a UNet is given the empty caption instead"
    )
