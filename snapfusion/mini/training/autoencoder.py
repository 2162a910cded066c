"""The VAE's two stages: encoder and decoder together, then the decoder alone with the encoder fixed."""

from collections.abc import Callable
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from snapfusion.mini.scenes import image_batch, to_signed
from snapfusion.mini.training.settings import StageSettings
from snapfusion.mini.training.stage import device_of, step_generator, training_indexes

_SQUARED_WEIGHT = 2.0
_KL_WEIGHT = 5e-3
"""The KL divergence is a mean over the latent's 256 numbers, the other terms over the image's."""


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error plus twice the mean squared error, both [B,3,H,W] in [-1, 1]."""
    difference = output - target
    return difference.abs().mean() + _SQUARED_WEIGHT * difference.square().mean()


def autoencoder_loss(
    vae: AutoencoderKL, *, stage: Literal["autoencoder", "decoder"], seed: int, settings: StageSettings
) -> Callable[[int], Tensor]:
    """Reconstruction loss from a sampled latent; in the first stage plus the posterior's KL divergence."""
    joint = stage == "autoencoder"

    def loss(step: int) -> Tensor:
        """Draw a batch by the step, and compute its loss."""
        generator = step_generator(seed=seed, stage=stage, step=step)
        images = to_signed(image_batch(training_indexes(settings.batch, generator)).to(device_of(vae)))
        with torch.set_grad_enabled(joint):
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample(generator)
        reconstruction = reconstruction_loss(vae.decode(latents).sample, images)
        if not joint:
            return reconstruction
        return reconstruction + _KL_WEIGHT * (posterior.kl().mean() / posterior.mean[0].numel())

    return loss


def decoder_parts(vae: AutoencoderKL) -> nn.Module:
    """The modules that the second stage trains: the decoder with the convolution before it."""
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
