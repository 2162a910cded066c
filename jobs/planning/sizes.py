"""The networks of a model: parameters and multiply-accumulates, counted on shapes, without weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snapfusion.models.architecture import Architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import costs_of
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
"""Models whose shapes are known here by name, so that nothing is downloaded to plan with them."""


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """One network.

    Attributes:
        parameters: numbers that are learned.
        gmacs: 10^9 multiply-accumulates of a forward pass for one latent or picture.
    """

    parameters: int
    gmacs: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSizes:
    """A model's networks.

    Attributes:
        bundle: the model on torch's meta device: shapes without numbers.
        architecture: of its UNet.
        unet: likewise.
        text: its text encoder.
        vae: parameters of its VAE.
        encoder: of its VAE.
        decoder: of its VAE.
        half: the half-width decoder.
    """

    bundle: Bundle
    architecture: Architecture
    unet: NetworkSize
    text: NetworkSize
    vae: int
    encoder: NetworkSize
    decoder: NetworkSize
    half: NetworkSize

    @property
    def tokens(self) -> int:
        """Of an encoded caption."""
        return int(self.bundle.tokenizer.model_max_length)

    @property
    def frozen(self) -> int:
        """Parameters of all but the UNet."""
        return self.text.parameters + self.vae

    def of(self, architecture: Architecture) -> NetworkSize:
        """A UNet of another architecture."""
        return unet_size(architecture, tokens=self.tokens)


def model_sizes(model: str) -> ModelSizes:
    """Of a model, by a source that `snapfusion.models.load` accepts; a published one is not opened."""
    return _published(PUBLISHED[model]) if model in PUBLISHED else _sizes(_without_numbers(load(model)))


@functools.lru_cache
def _published(name: str) -> ModelSizes:
    with torch.device("meta"):
        return _sizes(random_bundle(name))


def _sizes(bundle: Bundle) -> ModelSizes:
    with torch.device("meta"):
        half = HalfDecoder(DecoderConfig.half_of(bundle.vae))
    architecture, side = architecture_of(bundle.unet), bundle.image_size
    tokens = int(bundle.tokenizer.model_max_length)
    latent = torch.empty(1, *bundle.latent_shape, device="meta")
    picture = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    return ModelSizes(
        bundle=bundle,
        architecture=architecture,
        unet=unet_size(architecture, tokens=tokens),
        text=NetworkSize(
            parameters=_parameters(bundle.text_encoder),
            gmacs=_gmacs(
                lambda: bundle.encode_text(torch.zeros(1, tokens, dtype=torch.int64, device="meta"))
            ),
        ),
        vae=_parameters(bundle.vae),
        encoder=NetworkSize(
            parameters=_parameters(bundle.vae.encoder), gmacs=_gmacs(lambda: bundle.encode_images(picture))
        ),
        decoder=NetworkSize(
            parameters=_parameters(bundle.vae.decoder), gmacs=_gmacs(lambda: bundle.decode(latent))
        ),
        half=NetworkSize(parameters=_parameters(half), gmacs=_gmacs(lambda: half.decode(latent))),
    )


@functools.lru_cache(maxsize=64)
def unet_size(architecture: Architecture, *, tokens: int) -> NetworkSize:
    """A UNet of an architecture."""
    whole = costs_of(architecture, tokens=tokens).total
    return NetworkSize(parameters=whole.parameters, gmacs=whole.macs / 1e9)


def _without_numbers(bundle: Bundle) -> Bundle:
    networks = {name: copy.deepcopy(network).to("meta") for name, network in bundle.networks.items()}
    for name, network in networks.items():
        setattr(bundle, name, network)
    return bundle


def _gmacs(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return float(sum(counter.get_flop_counts()["Global"].values()) / 2e9)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
