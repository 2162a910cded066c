"""Describing a model: what it is, what of it is read, and what it costs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import count_parameters
from snapfusion.models.load import load
from snapfusion.models.locate import locate_file
from snapfusion.models.lora import describe_lora
from snapfusion.models.network_sizes import NetworkSizes, network_sizes, sizes_of
from snapfusion.models.random_weights import MODEL_CONFIGS, RANDOM_PREFIX
from snapfusion.models.source import parse_source
from snapfusion.models.stored import StoredModel, describe_stored
from snapfusion.prediction_types import PredictionType


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What a model costs.

    Attributes:
        parameters: learned parameters of each network, by name.
        float16_bytes: of all weights in float16.
        gmacs: 10^9 multiply-accumulates of a pass of the UNet for one latent; guidance takes two a step.
        decoder_gmacs: of the VAE's decoder for one latent.
        activation_bytes: most memory beside the weights of generating one image in 16 bits, without guidance.
    """

    parameters: dict[str, int]
    float16_bytes: int
    gmacs: float
    decoder_gmacs: float
    activation_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Everything that `snapfusion check` says of a model that can be used; plain values.

    Attributes:
        source: as given.
        stored: how it is stored.
        version: 1 or 2, of Stable Diffusion, by its text encoder.
        published_sizes: whether its UNet has the number of parameters of SD 1.5 or 2.1.
        prediction_type: "epsilon" or "v_prediction".
        schedule: (number of timesteps, first beta, last beta), scaled linear.
        image_size: side of the images in pixels.
        latent_shape: (channels, height, width).
        networks: the class of each network, by name.
        tokens: that the tokenizer knows.
        tokens_per_caption: that are read.
        merged: LoRAs in the weights, with the ranks and alphas of their modules, and textual inversions.
        distillation: record of a distilled model; None for any other.
        costs: what it costs.
        notes: lines that loading has logged, about what was missing and completed.
    """

    source: str
    stored: StoredModel
    version: int
    published_sizes: bool
    prediction_type: PredictionType
    schedule: tuple[int, float, float]
    image_size: int
    latent_shape: tuple[int, int, int]
    networks: dict[str, str]
    tokens: int
    tokens_per_caption: int
    merged: tuple[dict[str, Any], ...]
    distillation: dict[str, Any] | None
    costs: ModelCosts
    notes: tuple[str, ...]


def describe_model(source: str) -> ModelDescription:
    """Load a model on the CPU as every job does, and describe it; one with random weights is not built.

    Args:
        source: as of `snapfusion.models.load.load`.

    Raises:
        ModelError: if it cannot be used.
        ChecksumError: if it does not match its checksums.
    """
    if source in (f"{RANDOM_PREFIX}{name}" for name in MODEL_CONFIGS):
        stored = StoredModel(form="random weights", prediction_type_from="its name")
        return _describe(source, network_sizes(source), stored=stored)
    with _logged_lines() as notes:
        bundle = load(source)
    loras = (describe_lora(lora, locate_file(lora.path)) for lora in parse_source(source).loras)
    merged = (*loras, *(record for record in bundle.merged if "embedding" in record))
    stored = describe_stored(source)
    return _describe(source, sizes_of(bundle), stored=stored, merged=merged, notes=tuple(notes))


def _describe(
    source: str,
    sizes: NetworkSizes,
    *,
    stored: StoredModel,
    merged: tuple[dict[str, Any], ...] = (),
    notes: tuple[str, ...] = (),
) -> ModelDescription:
    bundle = sizes.bundle
    costs = _costs(sizes)
    published = (sd15.UNET_PARAMETERS, sd2.UNET_PARAMETERS)
    schedule = bundle.schedule
    return ModelDescription(
        source=source,
        stored=stored,
        version=_version(bundle),
        published_sizes=costs.parameters["unet"] == published[_version(bundle) - 1],
        prediction_type=bundle.prediction_type,
        schedule=(schedule.num_steps, schedule.beta_start, schedule.beta_end),
        image_size=bundle.image_size,
        latent_shape=bundle.latent_shape,
        networks={name: type(network).__name__ for name, network in bundle.networks.items()},
        tokens=len(bundle.tokenizer),
        tokens_per_caption=sizes.tokens,
        merged=merged,
        distillation=dict(bundle.distillation) if bundle.distillation else None,
        costs=costs,
        notes=notes,
    )


def _version(bundle: Bundle) -> int:
    """Of Stable Diffusion, by its text encoder."""
    return 2 if sd2.is_text_encoder(bundle.text_encoder.config) else 1


def _costs(sizes: NetworkSizes) -> ModelCosts:
    parameters = {name: count_parameters(network) for name, network in sizes.bundle.networks.items()}
    return ModelCosts(
        parameters=parameters,
        float16_bytes=2 * sum(parameters.values()),
        gmacs=sizes.unet.gmacs,
        decoder_gmacs=sizes.decoder_gmacs,
        activation_bytes=max(sizes.unet_bytes(sizes.architecture, trained=False), sizes.vae_bytes),
    )


@contextmanager
def _logged_lines() -> Iterator[list[str]]:
    """Collect the lines that modules of this package log, in place of printing them."""
    lines: list[str] = []
    logger = logging.getLogger(__package__)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
