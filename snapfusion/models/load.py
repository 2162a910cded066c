"""Loading a Stable Diffusion model: bundled, from a folder, an object store or a hub.

Only safetensors are read: unpickling can run arbitrary code.
"""

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
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.checksums import verify_checksums
from snapfusion.models.random_weights import MODEL_CONFIGS, RANDOM_PREFIX, random_bundle
from snapfusion.models.save import DISTILLATION_FILE
from snapfusion.models.unet import BlockUNet
from snapfusion.schedule import PREDICTION_TYPES, Schedule
from snapfusion.storage import get_tree

# A progress bar for each network would bury the output of a job.
transformers_logging.disable_progress_bar()

NetworkName = Literal["text_encoder", "unet", "vae"]
"""A network of a model, by its folder."""
_NETWORKS = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
_INDEX = "model_index.json"
_CONFIGS = ("unet/config.json", "vae/config.json")
_HUB_PATTERNS = (_INDEX, DISTILLATION_FILE, "*/*.json", "*/*.txt", "*/*.safetensors")
"""The files to download of a model on a hub."""
MODEL_FOLDER = "model"
"""The folder of the model in a run folder."""
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Old CLIP checkpoints contain the positions 0..76 as a tensor, which is not needed.
_IGNORED_KEYS = ("position_ids",)


class ModelError(ValueError):
    """A model that is missing, incomplete, altered or unsupported."""


def load(source: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """Load a Bundle, its networks on `device` in `dtype`, in evaluation mode.

    Args:
        source: "mini" or "mini-v", a diffusers folder or a run folder (which holds one as `model/`), an
            fsspec URL of either, a hub id such as "owner/name", or "random:sd15", "random:sd15-v" or
            "random:sd2" (full size, random weights).
        device: a torch device.
        dtype: of the networks.

    Raises:
        ModelError: if it is missing or incomplete, or holds only pickled weights.
        ChecksumError: if it does not match its checksums.
    """
    if source.startswith(RANDOM_PREFIX):
        name = source.removeprefix(RANDOM_PREFIX)
        if name not in MODEL_CONFIGS:
            accepted = ", ".join(f"{RANDOM_PREFIX}{known}" for known in MODEL_CONFIGS)
            raise ModelError(f"{source}: there is no such architecture; {accepted} are accepted")
        return random_bundle(name).to(device, dtype)
    return _load_folder(_locate(source), source=source).to(device, dtype)


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
    return _read_network(_locate(source) / part, source=source).float().eval()


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


def _configs(source: str) -> list[dict[str, Any]]:
    """Read the configurations of UNet and VAE."""
    name = source.removeprefix(RANDOM_PREFIX)
    if source.startswith(RANDOM_PREFIX) and name in MODEL_CONFIGS:
        return [MODEL_CONFIGS[name].unet, MODEL_CONFIGS[name].vae]
    if "://" in source:
        fs, path = fsspec.core.url_to_fs(source)
        root = path if fs.exists(f"{path}/{_INDEX}") else f"{path}/{MODEL_FOLDER}"
        try:
            return [json.loads(fs.cat_file(f"{root}/{name}")) for name in _CONFIGS]
        except (OSError, ValueError) as error:
            raise ModelError(f"{source}: its configurations cannot be read: {error}") from None
    folder = _locate(source, patterns=_CONFIGS)
    return [_read_json(folder / name, source=source) for name in _CONFIGS]


def _locate(source: str, *, patterns: Sequence[str] = _HUB_PATTERNS) -> Path:
    """Return the local folder of a model, after a download if necessary."""
    if source in BUNDLED:
        return BUNDLED[source]
    if "://" in source:
        return _fetch(source)
    folder = Path(source)
    if folder.is_dir():
        nested = folder / MODEL_FOLDER
        return nested if (nested / _INDEX).is_file() and not (folder / _INDEX).is_file() else folder
    if folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
        raise ModelError(f"there is no model folder {source!r}; give a diffusers folder, a URL or a hub id")
    return _download(source, patterns=patterns)


def _fetch(url: str) -> Path:
    """Copy a folder from object storage to the cache, unless the cache holds its current version."""
    fs, path = fsspec.core.url_to_fs(url)
    root = next((root for root in (path, f"{path}/{MODEL_FOLDER}") if fs.exists(f"{root}/{_INDEX}")), None)
    if root is None:
        raise ModelError(f"{url} has no {_INDEX}: it is not a diffusers folder")
    files = fs.find(root, detail=True)
    version = [url, *([name, info["size"], str(_version(info))] for name, info in sorted(files.items()))]
    cache = os.environ.get("SNAPFUSION_CACHE") or Path.home() / ".cache" / "snapfusion"
    target = Path(cache) / "models" / hashlib.sha256(json.dumps(version).encode()).hexdigest()[:16]
    if not target.is_dir():
        # Copied under a unique name and renamed, so that no process sees an incomplete copy. Of several
        # processes that copy at once, the first to finish wins.
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        get_tree(fs, root, partial)
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            if not target.is_dir():
                raise
    return target


def _version(info: Mapping[str, Any]) -> object:
    """Return what changes with an object's content; each kind of store has its own name for it."""
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return next((info[name] for name in names if info.get(name)), None)


def _download(hub_id: str, *, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except OSError as error:  # also the hub's own errors, which are derived from it
        raise ModelError(
            f"{hub_id!r} is neither a folder here nor a model the hub gave ({type(error).__name__}); "
            "give a diffusers folder, a URL of one, or a hub id that this machine can reach"
        ) from None


def _load_folder(folder: Path, *, source: str) -> Bundle:
    verify_checksums(folder)
    networks = {name: _read_network(folder / name, source=source) for name in _NETWORKS}
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", source=source)
    schedule = _schedule(scheduler, source=source)
    return Bundle(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        **networks,
        schedule=schedule,
        prediction_type=_prediction_type(scheduler, source=source),
        source=source,
        distillation=_distillation(folder / DISTILLATION_FILE, schedule=schedule, source=source),
    )


def _distillation(path: Path, *, schedule: Schedule, source: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record = _read_json(path, source=source)
    steps = record.get("steps") if isinstance(record, dict) else None
    if not isinstance(steps, int) or not 1 <= steps <= schedule.num_steps:
        raise ModelError(
            f"{source}: {path.name} says it was distilled for {steps!r} steps; a number from 1 to "
            f"{schedule.num_steps} is accepted"
        )
    return record


def _read_network(folder: Path, *, source: str) -> Any:  # noqa: ANN401 - one of three network classes
    config = _read_json(folder / "config.json", source=source)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
        found = f"only pickled weights ({', '.join(pickles)}), never opened" if pickles else "no weights"
        raise ModelError(f"{source}: {folder.name} has {found}; save it as safetensors")
    cls = BlockUNet if config.get("_class_name") == BlockUNet.__name__ else _NETWORKS[folder.name]
    options = {"use_safetensors": True, "output_loading_info": True}
    if cls is not CLIPTextModel:
        # Without `accelerate` diffusers ignores low_cpu_mem_usage, with a warning unless it is off.
        options["low_cpu_mem_usage"] = False
    try:
        network, info = cls.from_pretrained(folder, **options)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{source}: {folder.name}'s weights cannot be read: {reason}") from None
    # diffusers and transformers only warn about tensors that are missing or too many.
    for problem in ("missing", "mismatched", "unexpected"):
        keys = [key for key in info.get(f"{problem}_keys") or () if not str(key).endswith(_IGNORED_KEYS)]
        if keys:
            raise ModelError(f"{source}: {folder.name} has {len(keys)} {problem} tensors, such as {keys[0]}")
    return network


def _read_json(path: Path, *, source: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError:
        raise ModelError(f"{source}: {path.parent.name}/{path.name} is missing") from None
    except ValueError as error:
        raise ModelError(f"{source}: {path.parent.name}/{path.name} is not JSON: {error}") from None


def _schedule(scheduler: Mapping[str, Any], *, source: str) -> Schedule:
    kind = scheduler.get("beta_schedule", "linear")
    if kind != "scaled_linear":
        raise ModelError(f"{source}: beta_schedule is {kind!r}; 'scaled_linear' is accepted")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ModelError(f"{source}: rescaled betas (zero terminal SNR) are refused: x is undefined at t=999")
    return Schedule(
        num_steps=scheduler.get("num_train_timesteps", 1000),
        beta_start=scheduler.get("beta_start", 0.0001),
        beta_end=scheduler.get("beta_end", 0.02),
    )


def _prediction_type(scheduler: Mapping[str, Any], *, source: str) -> Any:  # noqa: ANN401 - checked literal
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        accepted = " or ".join(PREDICTION_TYPES)
        raise ModelError(f"{source}: prediction_type is {kind!r}; {accepted} is accepted")
    return kind
