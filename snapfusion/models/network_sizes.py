"""Counts parameters, multiply-accumulates and activation bytes of a model, on shapes alone."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from snapfusion.models.activation_memory import peak_bytes, unet_bytes
from snapfusion.models.architecture import Architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import Cost, costs_of, count_parameters
from snapfusion.models.decoder import DecoderConfig, HalfDecoder
from snapfusion.models.load import load
from snapfusion.models.random_weights import random_bundle
from snapfusion.models.unet import architecture_of

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "random:sd15": "sd15",
    "random:sd15-v": "sd15",
    "random:sd2": "sd2",
}
"""Models whose shapes are known by name, so that planning with them downloads nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkSizes:
    """Sizes of a model's networks.

    Attributes:
        bundle: the model on torch's meta device, shapes without numbers.
        architecture: of its UNet.
        frozen: parameters of the text encoder and the VAE.
        encoder_gmacs: 10^9 multiply-accumulates of the VAE's encoder for one image.
        decoder_gmacs: of its decoder for one latent.
        half: cost of the half-width decoder for one latent.
    """

    bundle: Bundle
    architecture: Architecture
    frozen: int
    encoder_gmacs: float
    decoder_gmacs: float
    half: Cost

    @property
    def latent_bytes(self) -> int:
        """Bytes of a stored latent, in float16."""
        return 2 * math.prod(self.bundle.latent_shape)

    @property
    def tokens(self) -> int:
        """Tokens of an encoded caption."""
        return int(self.bundle.tokenizer.model_max_length)

    @property
    def unet(self) -> Cost:
        """Cost of the model's own UNet for one latent."""
        return self.of(self.architecture)

    def of(self, architecture: Architecture) -> Cost:
        """Cost of a UNet of another architecture."""
        return _unet_cost(architecture, tokens=self.tokens)

    def unet_bytes(self, architecture: Architecture, *, trained: bool, checkpointing: bool = False) -> int:
        """Activation bytes of a UNet for one latent (`snapfusion.models.activation_memory`)."""
        return unet_bytes(architecture, tokens=self.tokens, trained=trained, checkpointing=checkpointing)

    @cached_property
    def vae_bytes(self) -> int:
        """Activation bytes, two a number, for one image through the VAE's encoder or decoder."""
        side, vae = self.bundle.image_size, self.bundle.vae.to(torch.bfloat16)
        image = torch.empty(1, 3, side, side, dtype=torch.bfloat16, device="meta")
        latent = torch.empty(1, *self.bundle.latent_shape, dtype=torch.bfloat16, device="meta")
        return max(
            peak_bytes(vae, lambda: vae.encode(image).latent_dist.mean, trained=False),
            peak_bytes(vae, lambda: vae.decode(latent).sample, trained=False),
        )

    @cached_property
    def half_bytes(self) -> int:
        """Activation bytes, two a number, for one latent through the half-width decoder and back."""
        decoder = _half_decoder(self.bundle).to(torch.bfloat16)
        latent = torch.empty(1, *self.bundle.latent_shape, dtype=torch.bfloat16, device="meta")
        return peak_bytes(decoder, lambda: decoder(latent), trained=True)


def network_sizes(model: str) -> NetworkSizes:
    """Sizes of a model by its source (`snapfusion.models.load`); published ones are not opened."""
    if model in PUBLISHED:
        return _published(PUBLISHED[model])
    bundle = load(model)
    return sizes_of(bundle)


@functools.lru_cache
def _published(name: str) -> NetworkSizes:
    with torch.device("meta"):
        return sizes_of(random_bundle(name))


def sizes_of(bundle: Bundle) -> NetworkSizes:
    """Sizes of a loaded model, whose networks are moved to the meta device: its weights are lost."""
    for network in bundle.networks.values():
        network.to("meta")
    side, half = bundle.image_size, _half_decoder(bundle)
    latent = torch.empty(1, *bundle.latent_shape, device="meta")
    image = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    return NetworkSizes(
        bundle=bundle,
        architecture=architecture_of(bundle.unet),
        frozen=count_parameters(bundle.text_encoder) + count_parameters(bundle.vae),
        encoder_gmacs=_macs(lambda: bundle.encode_images(image)) / 1e9,
        decoder_gmacs=_macs(lambda: bundle.decode(latent)) / 1e9,
        half=Cost(parameters=half.num_parameters, macs=_macs(lambda: half.decode(latent))),
    )


@functools.lru_cache(maxsize=64)
def _unet_cost(architecture: Architecture, *, tokens: int) -> Cost:
    return costs_of(architecture, tokens=tokens).total


def _half_decoder(bundle: Bundle) -> HalfDecoder:
    with torch.device("meta"):
        return HalfDecoder(DecoderConfig.half_of(bundle.vae))


def _macs(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(sum(counter.get_flop_counts()["Global"].values())) // 2
