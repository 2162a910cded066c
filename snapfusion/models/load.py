"""Loading a Stable Diffusion model: bundled, from a folder, an object store or a hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from torch import nn

from snapfusion.models.bundle import Bundle
from snapfusion.models.checksums import verify_checksums
from snapfusion.models.distillation_record import DISTILLATION_FILE, check_distillation
from snapfusion.models.errors import ModelError
from snapfusion.models.local_folder import INDEX_FILE, MODEL_FOLDER, SCHEDULER_CONFIG
from snapfusion.models.locate import SINGLE_FILE_SUFFIX, locate, locate_file
from snapfusion.models.lora import merge_loras
from snapfusion.models.network_files import NETWORKS, read_json, read_network, variants
from snapfusion.models.random_weights import MODEL_CONFIGS, RANDOM_PREFIX, ModelConfig, random_bundle
from snapfusion.models.scheduler_config import read_scheduler
from snapfusion.models.single_file import read_single_file, single_file_configs, single_file_prediction_type
from snapfusion.models.source import ModelSource, parse_source
from snapfusion.models.supported import check_supported
from snapfusion.models.textual_inversion import add_embeddings
from snapfusion.models.tokenizer_files import read_tokenizer
from snapfusion.prediction_types import PredictionType
from snapfusion.records import parse_record
from snapfusion.schedule import Schedule

NetworkName = Literal["text_encoder", "unet", "vae"]
"""A network of a model, by its folder."""
_SIZE_CONFIGS = ("unet/config.json", "vae/config.json")


def load(source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a Bundle, its networks on `device` in `dtype`, in evaluation mode.

    Args:
        source: "mini" or "mini-v", a diffusers folder or a run folder (which holds one as `model/`), a
            single-file checkpoint (.safetensors), an fsspec URL of these, a hub id such as "owner/name", or
            "random:sd15", "random:sd15-v" or "random:sd2" (full size, random weights). Options may follow
            (`snapfusion.models.source`).
        device: a torch device.
        dtype: of the networks.

    Raises:
        ModelError: if it is missing, incomplete, of an unsupported kind or not finite, or holds only pickled
            weights.
        ChecksumError: if it does not match its checksums.
    """
    if source.startswith(RANDOM_PREFIX):
        name = source.removeprefix(RANDOM_PREFIX)
        if name not in MODEL_CONFIGS:
            accepted = ", ".join(f"{RANDOM_PREFIX}{known}" for known in MODEL_CONFIGS)
            raise ModelError(f"{source}: there is no such architecture; {accepted} are accepted")
        return random_bundle(name).to(device, dtype)
    model = parse_source(source)
    path = locate(model.path, revision=model.revision, variant=model.variant)
    if path.is_file():
        bundle = read_single_file(path, model=model, source=source)
    else:
        bundle = _load_folder(path, model=model, source=source)
    merge_loras(bundle, model.loras, [locate_file(lora.path) for lora in model.loras])
    add_embeddings(bundle, model.embeddings, [locate_file(file.path) for file in model.embeddings])
    return bundle.to(device, dtype)


def load_network(source: str, *, part: NetworkName) -> nn.Module:
    """Load one network of a model without reading the others, float32 on the CPU in evaluation mode.

    Checksums are not verified, because they cover all files of the model; `load` does.

    Args:
        source: as of `load`. A model with random weights is built completely.
        part: the network.

    Raises:
        ModelError: if it is missing or cannot be read.
    """
    if source.startswith(RANDOM_PREFIX):
        return load(source).networks[part]
    model = parse_source(source)
    path = locate(model.path, revision=model.revision, variant=model.variant)
    if path.is_file() or model.loras or model.embeddings:
        network = load(source).networks[part]
    else:
        network = read_network(path / part, source=source, variant=model.variant)
    return network.float().eval()


@dataclass(frozen=True, kw_only=True)
class ModelDimensions:
    """Sizes of a model's images and latents.

    Attributes:
        side: side of the images, in pixels.
        cell: pixels per latent element along a side.
        granularity: pixels of which sides must be multiples, so that each level of the UNet halves evenly.
        channels: of the latent.
    """

    side: int
    cell: int
    granularity: int
    channels: int


def load_sizes(source: str) -> ModelDimensions:
    """Read the sizes of a model from its configurations; no weights are read.

    Raises:
        ModelError: if it is missing.
    """
    unet, vae = _configs(source)
    cell = 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelDimensions(
        side=unet["sample_size"] * cell,
        cell=cell,
        granularity=cell * 2 ** (len(unet["block_out_channels"]) - 1),
        channels=unet["in_channels"],
    )


def load_prediction_type(source: str) -> PredictionType:
    """Read whether a model predicts eps or v; no weights are read.

    Raises:
        ModelError: if it is missing, or its scheduler is not supported.
    """
    if (random := _random_config(source)) is not None:
        return random.prediction_type
    found = _config_files(source, (SCHEDULER_CONFIG,))
    if isinstance(found, Path):
        return single_file_prediction_type(found, model=parse_source(source), source=source)[0]
    return read_scheduler(found[0], source=source)[1]


def _configs(source: str) -> list[dict[str, Any]]:
    """Read the configurations of UNet and VAE."""
    if (random := _random_config(source)) is not None:
        return [random.unet, random.vae]
    found = _config_files(source, _SIZE_CONFIGS)
    if isinstance(found, Path):
        configs = single_file_configs(found, model=parse_source(source), source=source)
        return [configs.unet, configs.vae]
    return found


def _random_config(source: str) -> ModelConfig | None:
    """The configurations of a model with random weights; None for any other source."""
    name = source.removeprefix(RANDOM_PREFIX)
    return MODEL_CONFIGS.get(name) if name != source else None


def _config_files(source: str, names: Sequence[str]) -> list[dict[str, Any]] | Path:
    """Read JSON files of a model's folder; the path of a single-file checkpoint, which has none."""
    model = parse_source(source)
    if "://" in model.path and not model.path.endswith(SINGLE_FILE_SUFFIX):
        fs, path = fsspec.core.url_to_fs(model.path)
        root = path if fs.exists(f"{path}/{INDEX_FILE}") else f"{path}/{MODEL_FOLDER}"
        try:
            return [parse_record(fs.cat_file(f"{root}/{name}"), name=name) for name in names]
        except (OSError, ValueError) as error:
            raise ModelError(f"{source}: its configurations cannot be read: {error}") from None
    path = locate(model.path, revision=model.revision, patterns=names)
    return path if path.is_file() else [read_json(path / name, source=source) for name in names]


def _load_folder(folder: Path, *, model: ModelSource, source: str) -> Bundle:
    check_supported(folder, source=source)
    verify_checksums(folder)
    if model.variant is not None:
        known = set().union(*(variants(folder / name) for name in NETWORKS)) - {None}
        if model.variant not in known:
            names = ", ".join(sorted(filter(None, known))) or "none"
            raise ModelError(f"{source}: there is no variant {model.variant!r}; its variants are: {names}")
    networks = {name: read_network(folder / name, source=source, variant=model.variant) for name in NETWORKS}
    scheduler = read_json(folder / SCHEDULER_CONFIG, source=source)
    schedule, prediction_type = read_scheduler(scheduler, source=source)
    text_encoder = networks["text_encoder"].config.to_dict()
    return Bundle(
        tokenizer=read_tokenizer(folder / "tokenizer", text_encoder=text_encoder, source=source),
        **networks,
        schedule=schedule,
        prediction_type=prediction_type,
        source=source,
        distillation=_distillation(folder / DISTILLATION_FILE, schedule=schedule, source=source),
    )


def _distillation(path: Path, *, schedule: Schedule, source: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record = read_json(path, source=source)
    return check_distillation(record, schedule=schedule, where=f"{source}: {path.name}")
