"""A Stable Diffusion from wherever it lies: the bundled miniature, a folder, an object store, a hub.

Weights are read from safetensors alone. A pickle can run code when it is opened, so none ever is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from snapfusion.models.bundle import Bundle
from snapfusion.models.checksums import verify_checksums
from snapfusion.models.random_weights import MODEL_CONFIGS, RANDOM_PREFIX, random_bundle
from snapfusion.models.save import DISTILLATION_FILE
from snapfusion.models.unet import BlockUNet
from snapfusion.schedule import PREDICTION_TYPES, Schedule

# A progress bar for each shard of weights would bury what a job prints.
transformers_logging.disable_progress_bar()

_WEIGHTS = Path(__file__).parents[1] / "mini" / "weights"
BUNDLED = {"mini": _WEIGHTS / "sd", "mini-v": _WEIGHTS / "sd-v"}
"""The miniatures that are part of this package: one predicts eps, one v (SnapFusion Eq. 6)."""

_NETWORKS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
# Without `accelerate` diffusers loads the plain way in any case; told so, it does not complain.
_LOAD_OPTIONS = {
    "text_encoder": {},
    "unet": {"low_cpu_mem_usage": False},
    "vae": {"low_cpu_mem_usage": False},
}
NetworkName = Literal["text_encoder", "unet", "vae"]
"""A network of a model, by its folder."""
_INDEX = "model_index.json"
_HUB_PATTERNS = (_INDEX, DISTILLATION_FILE, "*/*.json", "*/*.txt", "*/*.safetensors")
"""The files of a model on a hub."""
MODEL_FOLDER = "model"
"""Where the folder of a training holds its model."""
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Old CLIP checkpoints carry the positions 0..76 as a tensor; nothing is lost by leaving it.
_IGNORED_KEYS = ("position_ids",)


class ModelError(ValueError):
    """A model that is missing, incomplete, altered or of a kind that is not accepted."""


def load(source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """A Bundle from `source`, its networks on `device` in `dtype`, in evaluation mode.

    Args:
        source: "mini" or "mini-v", a diffusers folder or the folder of a training (which holds one as
            `model/`), a URL of either that fsspec can read, a hub id such as "owner/name", or "random:sd15",
            "random:sd15-v" or "random:sd2" (full size, random weights).
        device: a torch device.
        dtype: of the networks.

    Raises:
        ModelError: if it is not there, lacks a part, holds only pickled weights, or does not match its seal.
    """
    if source.startswith(RANDOM_PREFIX):
        name = source.removeprefix(RANDOM_PREFIX)
        if name not in MODEL_CONFIGS:
            accepted = ", ".join(f"{RANDOM_PREFIX}{known}" for known in MODEL_CONFIGS)
            raise ModelError(f"{source}: there is no such architecture; {accepted} are accepted")
        return random_bundle(name).to(device, dtype)
    return _load_folder(_locate(source), source=source).to(device, dtype)


def load_network(source: str, *, part: NetworkName) -> nn.Module:
    """One network of a model, float32 on the CPU in evaluation mode; the others are not read.

    Neither is the model's seal, which is over all of its files: `load` holds a model to it.

    Args:
        source: as `load` takes it. Of random weights the whole model is made, and the others dropped.
        part: "text_encoder", "unet" or "vae".

    Raises:
        ModelError: if it is not there or cannot be read.
    """
    if source.startswith(RANDOM_PREFIX):
        return load(source).networks[part]
    network: nn.Module = _read_network(_locate(source) / part, source=source)
    return network.float().eval()


@dataclass(frozen=True, kw_only=True)
class ModelDimensions:
    """Of a model: the side of its pictures and of a cell of their latents, in pixels; a cell's channels.

    Sides are multiples of `granularity`, so that each level of the UNet halves evenly.
    """

    side: int
    cell: int
    granularity: int
    channels: int


def load_sizes(source: str) -> ModelDimensions:
    """What size a model's pictures and latents have, by its configurations alone; no weights are read.

    Raises:
        ModelError: if it is not there.
    """
    unet, vae = _configurations(source)
    cell = 2 ** (len(vae["block_out_channels"]) - 1)
    levels = len(unet["block_out_channels"])
    return ModelDimensions(
        side=unet["sample_size"] * cell,
        cell=cell,
        granularity=cell * 2 ** (levels - 1),
        channels=unet["in_channels"],
    )


def _configurations(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if source.startswith(RANDOM_PREFIX) and source.removeprefix(RANDOM_PREFIX) in MODEL_CONFIGS:
        architecture = MODEL_CONFIGS[source.removeprefix(RANDOM_PREFIX)]
        return architecture.unet, architecture.vae
    names = ("unet/config.json", "vae/config.json")
    if "://" in source:
        filesystem, path = fsspec.core.url_to_fs(source)
        place = path if filesystem.exists(f"{path}/{_INDEX}") else f"{path}/{MODEL_FOLDER}"
        try:
            unet, vae = (json.loads(filesystem.cat_file(f"{place}/{name}")) for name in names)
        except (OSError, ValueError) as error:
            raise ModelError(f"{source}: its configurations cannot be read: {error}") from None
        return unet, vae
    folder = _locate(source, patterns=names)
    unet, vae = (_read_json(folder / name, source=source) for name in names)
    return unet, vae


def _locate(source: str, *, patterns: Sequence[str] = _HUB_PATTERNS) -> Path:
    if source in BUNDLED:
        return BUNDLED[source]
    if "://" in source:
        return _fetch(source)
    folder = Path(source)
    if folder.is_dir():
        trained = folder / MODEL_FOLDER
        return trained if (trained / _INDEX).is_file() and not (folder / _INDEX).is_file() else folder
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise ModelError(f"there is no model folder {source!r}; give a diffusers folder, a URL or a hub id")
    return _download(source, patterns=patterns)


def _fetch(url: str) -> Path:
    """Copy a folder from object storage, once as long as it does not change there.

    A half-made copy is never taken for a whole one; of processes that copy at the same time one is first.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    places = (path, f"{path}/{MODEL_FOLDER}")
    place = next((place for place in places if filesystem.exists(f"{place}/{_INDEX}")), None)
    if place is None:
        raise ModelError(f"{url} has no {_INDEX}: it is not a diffusers folder")
    files = filesystem.find(place, detail=True)
    state = [url, *([name, told["size"], str(_version(told))] for name, told in sorted(files.items()))]
    root = os.environ.get("SNAPFUSION_CACHE") or Path.home() / ".cache" / "snapfusion"
    target = Path(root) / "models" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        filesystem.get(f"{place}/", f"{partial}/", recursive=True)
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            if not target.is_dir():
                raise
    return target


def _version(told: Mapping[str, Any]) -> object:
    """What stores change with an object's content, each under a name of its own."""
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((told[name] for name in names if told.get(name)), None)


def _download(hub_id: str, *, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{hub_id!r} is neither a folder here nor a model the hub gave ({type(error).__name__}); "
            "give a diffusers folder, a URL of one, or a hub id that this machine can reach"
        ) from None


def _load_folder(folder: Path, *, source: str) -> Bundle:
    verify_checksums(folder)
    networks = {name: _read_network(folder / name, source=source) for name in _NETWORKS}
    settings = _read_json(folder / "scheduler" / "scheduler_config.json", source=source)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    schedule = _schedule(settings, source=source)
    return Bundle(
        tokenizer=tokenizer,
        **networks,
        schedule=schedule,
        prediction_type=_prediction_type(settings, source=source),
        source=source,
        distillation=_distillation(folder / DISTILLATION_FILE, schedule=schedule, source=source),
    )


def _distillation(path: Path, *, schedule: Schedule, source: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    told = _read_json(path, source=source)
    steps = told.get("steps") if isinstance(told, dict) else None
    if not isinstance(steps, int) or not 1 <= steps <= schedule.num_steps:
        raise ModelError(
            f"{source}: {path.name} says it was distilled for {steps!r} steps; a number from 1 to "
            f"{schedule.num_steps} is accepted"
        )
    return told


def _read_network(folder: Path, *, source: str) -> Any:  # noqa: ANN401 - one of three network classes
    config = folder / "config.json"
    described = _read_json(config, source=source)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ModelError(
                f"{source}: {folder.name} has only pickled weights ({', '.join(pickles)}), which are never "
                "opened; save it as safetensors"
            )
        raise ModelError(f"{source}: {folder.name} has no weights (a .safetensors file)")
    kind = BlockUNet if described.get("_class_name") == BlockUNet.__name__ else _NETWORKS[folder.name]
    try:
        network, told = kind.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **_LOAD_OPTIONS[folder.name]
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{source}: {folder.name}'s weights cannot be read: {reason}") from None
    _check_complete(told, name=folder.name, source=source)
    return network


def _check_complete(told: dict[str, Any], *, name: str, source: str) -> None:
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = [key for key in told.get(kind) or () if not str(key).endswith(_IGNORED_KEYS)]
        if keys:
            what = kind.removesuffix("_keys")
            raise ModelError(f"{source}: {name} has {len(keys)} {what} tensors, for example {keys[0]}")


def _read_json(path: Path, *, source: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except OSError:
        raise ModelError(f"{source}: {path.parent.name}/{path.name} is missing") from None
    except ValueError as error:
        raise ModelError(f"{source}: {path.parent.name}/{path.name} is not JSON: {error}") from None
    return values


def _schedule(settings: dict[str, Any], *, source: str) -> Schedule:
    kind = settings.get("beta_schedule", "linear")
    if kind != "scaled_linear":
        raise ModelError(f"{source}: beta_schedule is {kind!r}; 'scaled_linear' is accepted")
    if settings.get("rescale_betas_zero_snr"):
        raise ModelError(
            f"{source}: rescaled betas (zero terminal SNR) are not accepted: x has no value at t=999"
        )
    return Schedule(
        num_steps=settings.get("num_train_timesteps", 1000),
        beta_start=settings.get("beta_start", 0.0001),
        beta_end=settings.get("beta_end", 0.02),
    )


def _prediction_type(settings: dict[str, Any], *, source: str) -> Any:  # noqa: ANN401 - checked literal
    kind = settings.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ModelError(
            f"{source}: prediction_type is {kind!r}; {' or '.join(PREDICTION_TYPES)} is accepted"
        )
    return kind
