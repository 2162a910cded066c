"""The VAE's two stages: encoder and decoder together, then the decoder alone behind the fixed encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from snapfusion.mini.scenes import image_batch, to_signed
from snapfusion.mini.training.settings import StageSettings
from snapfusion.mini.training.stage import device_of, step_generator, training_indexes

_SQUARED_WEIGHT = 2.0
_KL_WEIGHT = 5e-3
"""Against the mean over the latent's 256 numbers; the other terms are means over the picture's."""


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error plus twice the mean squared error, both [B,3,H,W] in [-1, 1]."""
    difference = output - target
    return difference.abs().mean() + _SQUARED_WEIGHT * difference.square().mean()


def joint_loss(vae: AutoencoderKL, *, seed: int, settings: StageSettings) -> Callable[[int], Tensor]:
    """The loss of encoder and decoder: reconstruction from a sampled latent, and the KL divergence."""

    def loss(step: int) -> Tensor:
        generator = step_generator(seed=seed, stage="autoencoder", step=step)
        images = to_signed(image_batch(training_indexes(settings.batch, generator)).to(device_of(vae)))
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(output, images) + _KL_WEIGHT * kl

    return loss


def decoder_loss(vae: AutoencoderKL, *, seed: int, settings: StageSettings) -> Callable[[int], Tensor]:
    """The decoder's loss: reconstruction from a latent that the fixed encoder's posterior yields."""

    def loss(step: int) -> Tensor:
        generator = step_generator(seed=seed, stage="decoder", step=step)
        images = to_signed(image_batch(training_indexes(settings.batch, generator)).to(device_of(vae)))
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample(generator)
        return reconstruction_loss(vae.decode(latents).sample, images)

    return loss


def decoder_parts(vae: AutoencoderKL) -> nn.Module:
    """What the second stage trains: the decoder with the convolution in front of it."""
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
