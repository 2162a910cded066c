"""The UNets' stages on precomputed latents: noise and velocity prediction, then both with noisy captions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from snapfusion.losses import velocity_loss
from snapfusion.mini.scenes import image_batch, to_signed
from snapfusion.mini.training.noisy_captions import NoisyCaptions
from snapfusion.mini.training.settings import DenoiserSettings, MiniTraining
from snapfusion.mini.training.stage import device_of, step_generator
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.blocks import blocks_of, skipping_blocks
from snapfusion.schedule import Schedule

UNetStage = Literal["denoiser", "velocity", "noisy_denoiser", "noisy_velocity"]
"""The stages of the UNet that predicts eps, and of the one that predicts v."""

_ENCODE_BATCH = 100


@torch.inference_mode()
def latents_of(vae: AutoencoderKL, *, count: int, path: Path) -> Tensor:
    """Posterior means float32 [count, 4, 8, 8] of the first training scenes, cached at `path`."""
    if not path.exists():
        device, means = device_of(vae), []
        for start in range(0, count, _ENCODE_BATCH):
            images = image_batch(range(start, min(start + _ENCODE_BATCH, count))).to(device)
            means.append(vae.encode(to_signed(images)).latent_dist.mean.cpu())
        partial = path.with_suffix(".partial")
        save_file({"means": torch.cat(means).contiguous()}, partial)
        partial.replace(path)
    return load_file(path)["means"]


@dataclass(frozen=True, kw_only=True)
class EncodedScenes:
    """Training data of the UNets.

    Attributes:
        latents: float32 [S,4,8,8], scaled to unit standard deviation; row i is of scene i.
        captions: right and noisy ones.
        conditions: float32 [C,L,D], of the texts of `captions`.
        null: float32 [L,D], of the empty string.
    """

    latents: Tensor
    captions: NoisyCaptions
    conditions: Tensor
    null: Tensor


def denoiser_loss(
    unet: UNet2DConditionModel,
    encoded: EncodedScenes,
    *,
    schedule: Schedule,
    stage: UNetStage,
    settings: MiniTraining,
) -> Callable[[int], Tensor]:
    """Mean squared error of eps (Ho et al. 2020) or of v (SnapFusion Eq. 6), with some captions dropped.

    Args:
        unet: to train.
        encoded: latents and conditions.
        schedule: of alpha_t and sigma_t.
        stage: the name of its settings, and part of the random numbers' seed.
        settings: of the whole training.
    """
    own: DenoiserSettings = getattr(settings, stage)
    batch = own.batch

    def loss(step: int) -> Tensor:
        """Draw a batch by the step, and compute its loss."""
        generator = step_generator(seed=settings.seed, stage=stage, step=step)
        rows = torch.randint(len(encoded.latents), (batch,), generator=generator)
        # One timestep in each of B equal parts of the schedule: the same expectation as uniform timesteps,
        # with less variance.
        parts = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (parts * (schedule.num_steps / batch)).long().clamp(max=schedule.num_steps - 1)
        x = encoded.latents[rows]
        eps = torch.randn(x.shape, generator=generator)
        dropped = torch.rand(batch, generator=generator) < settings.caption_dropout
        captions = rows % NUM_CAPTIONS
        if stage.startswith("noisy"):
            captions = encoded.captions.draw(captions, generator=generator)
        c = torch.where(dropped.view(-1, 1, 1), encoded.null, encoded.conditions[captions])
        x, eps, t, c = (tensor.to(device_of(unet)) for tensor in (x, eps, t, c))
        z_t = schedule.diffuse(x=x, eps=eps, t=t)
        with skipping_blocks(unet, skipped_blocks(unet, step=step, generator=generator, settings=own)):
            output = unet(z_t, t, encoder_hidden_states=c).sample
        if stage.endswith("velocity"):
            return velocity_loss(output, x=x, eps=eps, t=t, schedule=schedule).mean()
        return functional.mse_loss(output, eps)

    return loss


def skipped_blocks(
    unet: UNet2DConditionModel, *, step: int, generator: torch.Generator, settings: DenoiserSettings
) -> list[str]:
    """The cross-attention blocks that a step skips: those above a depth, which is 0 for none."""
    attention = [block for block in blocks_of(unet) if block.kind == "attention"]
    deepest = max(block.depth for block in attention)
    draws = torch.rand(2, generator=generator).tolist()
    if step < settings.deep_first * settings.steps:
        depth = deepest
    elif draws[0] < settings.shallow_skip:
        depth = 1 + int(draws[1] * deepest)
    else:
        depth = 0
    return [block.name for block in attention if block.depth < depth]
