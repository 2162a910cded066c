"""The UNet's stage: SD-v1.5's own objective, the error of the predicted noise, on latents computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from snapfusion.mini.scenes import NUM_CAPTIONS, image_batch, to_signed
from snapfusion.mini.training.settings import MiniTraining
from snapfusion.mini.training.stage import step_generator
from snapfusion.schedule import Schedule

_ENCODE_BATCH = 100


@torch.inference_mode()
def latents_of(vae: AutoencoderKL, *, count: int, path: Path) -> Tensor:
    """Posterior means float32 [count, 4, 8, 8] of the first training scenes, kept at `path` once computed."""
    if not path.exists():
        batches = [
            range(start, min(start + _ENCODE_BATCH, count)) for start in range(0, count, _ENCODE_BATCH)
        ]
        means = [vae.encode(to_signed(image_batch(batch))).latent_dist.mean for batch in batches]
        partial = path.with_suffix(".partial")
        save_file({"means": torch.cat(means).contiguous()}, partial)
        partial.replace(path)
    return load_file(path)["means"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What the UNet is trained on.

    Attributes:
        latents: float32 [S,4,8,8], scaled to unit spread; row i is of scene i.
        conditions: float32 [1200,L,D], row i is of the caption of scene i, so also of scene i + 1200.
        null: float32 [L,D], of the empty string.
    """

    latents: Tensor
    conditions: Tensor
    null: Tensor


def denoiser_loss(
    unet: UNet2DConditionModel, encoded: Encoded, *, schedule: Schedule, settings: MiniTraining
) -> Callable[[int], Tensor]:
    """Mean squared error of eps (Ho et al. 2020), with captions dropped so that guidance has its other half.

    The timesteps of a batch are spread evenly over the schedule, one in each of B equal parts: the same
    expectation as drawing each from all of it, with less noise.
    """
    batch = settings.denoiser.batch

    def loss(step: int) -> Tensor:
        generator = step_generator(seed=settings.seed, stage="denoiser", step=step)
        rows = torch.randint(len(encoded.latents), (batch,), generator=generator)
        parts = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (parts * (schedule.num_steps / batch)).long().clamp(max=schedule.num_steps - 1)
        eps = torch.randn((batch, *encoded.latents.shape[1:]), generator=generator)
        dropped = torch.rand(batch, generator=generator) < settings.caption_dropout
        c = torch.where(dropped.view(-1, 1, 1), encoded.null, encoded.conditions[rows % NUM_CAPTIONS])
        z_t = schedule.diffuse(x=encoded.latents[rows], eps=eps, t=t)
        return functional.mse_loss(unet(z_t, t, encoder_hidden_states=c).sample, eps)

    return loss
