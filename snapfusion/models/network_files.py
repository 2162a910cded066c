"""Reading the networks of a diffusers folder from safetensors, complete and finite.

Only safetensors are read: unpickling can run arbitrary code.
"""

import re
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from snapfusion.models.architecture import Architecture
from snapfusion.models.checkpoint_file import is_lfs_pointer
from snapfusion.models.errors import ModelError
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.records import RecordError, parse_record

# A progress bar for each network would bury the output of a job.
transformers_logging.disable_progress_bar()

NETWORKS: Final = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
"""The stock class of each network, by its folder."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Of files that hold pickled weights, which are never opened."""
# Old CLIP checkpoints contain the positions 0..76 as a tensor, which is not needed.
_IGNORED_KEYS = ("position_ids",)
# Where a folder has no plain weights but several variants.
_PREFERRED_VARIANT = "fp16"
# model.fp16.safetensors, and of several files model.fp16-00001-of-00002 or model-00001-of-00002.fp16.
_WEIGHTS_NAME = re.compile(r"^[^.]+?(?:\.([^.]+?))?(?:-\d+-of-\d+)?(?:\.([^.]+))?\.safetensors$")


def read_network(
    folder: Path, *, source: str, variant: str | None = None, cls: type[Any] | None = None
) -> Any:  # noqa: ANN401 - of any class
    """Read a network of a model in the dtype of its class, on the CPU.

    Args:
        folder: of the network, its config.json, and weights in one safetensors file or several with an index.
        source: the model, named in errors.
        variant: of the weights, such as "fp16" or "non_ema"; None for the plain ones, or the only ones there.
        cls: of the network; None for that of the folder's name, or `BlockUNet` if the configuration says so.

    Raises:
        ModelError: if weights are missing, torn, pickled, not finite, or do not fit the configuration.
    """
    config = read_json(folder / "config.json", source=source)
    variant = _variant(folder, variant=variant, source=source)
    if cls is None:
        cls = BlockUNet if config.get("_class_name") == BlockUNet.__name__ else NETWORKS[folder.name]
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "variant": variant}
    if issubclass(cls, ModelMixin):
        # Without `accelerate` diffusers ignores low_cpu_mem_usage, with a warning unless it is off.
        options["low_cpu_mem_usage"] = False
    try:
        if cls is BlockUNet:
            options["architecture"] = Architecture.parse(config.get("architecture", {})).to_values()
        network, info = cls.from_pretrained(folder, **options)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{source}: {folder.name}'s weights cannot be read: {reason}") from None
    # diffusers and transformers only warn about tensors that are missing or too many.
    for problem in ("missing", "mismatched", "unexpected"):
        keys = [key for key in info.get(f"{problem}_keys") or () if not str(key).endswith(_IGNORED_KEYS)]
        if keys:
            raise ModelError(f"{source}: {folder.name} has {len(keys)} {problem} tensors, such as {keys[0]}")
    check_finite(network, name=folder.name, source=source)
    return network


def check_finite(network: nn.Module, *, name: str, source: str) -> None:
    """Refuse weights that are NaN or infinite, which draw black images without an error.

    Raises:
        ModelError: naming the first such tensor.
    """
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{source}: {name}'s tensor {key} has values that are NaN or infinite")


def read_json(path: Path, *, source: str) -> dict[str, Any]:
    """Read a configuration of a model.

    Raises:
        ModelError: if it is missing or damaged.
    """
    try:
        return parse_record(path.read_bytes(), name=f"{source}: {path.parent.name}/{path.name}")
    except OSError:
        raise ModelError(f"{source}: {path.parent.name}/{path.name} is missing") from None
    except RecordError as error:
        raise ModelError(str(error)) from None


def variants(folder: Path) -> set[str | None]:
    """List the variants of a network's weights by its files' names; None stands for the plain weights."""
    return set(group_by_variant(_weights(folder)))


def weight_files(folder: Path, *, source: str, variant: str | None = None) -> list[Path]:
    """List the files from which `read_network` reads the weights, of the same arguments.

    Raises:
        ModelError: if there are no weights that can be read.
    """
    chosen = _variant(folder, variant=variant, source=source)
    return group_by_variant(_weights(folder))[chosen]


def group_by_variant(files: Iterable[Path]) -> dict[str | None, list[Path]]:
    """Group files of weights by the variant in their names; None stands for the plain weights."""
    groups: dict[str | None, list[Path]] = {}
    for path in files:
        if match := _WEIGHTS_NAME.search(path.name):
            groups.setdefault(match.group(1) or match.group(2), []).append(path)
    return groups


def choose_variant(there: Set[str | None], *, variant: str | None) -> str | None:
    """Return the variant to read: the named one if there, else the plain weights, else fp16 or the first."""
    if variant in there or None in there:
        return variant if variant in there else None
    names = sorted(name for name in there if name)
    return _PREFERRED_VARIANT if _PREFERRED_VARIANT in names else names[0]


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _variant(folder: Path, *, variant: str | None, source: str) -> str | None:
    """Return the variant to read: the named one if there, else the plain weights, else the only ones there.

    Raises:
        ModelError: if there are no weights that can be read.
    """
    files = _weights(folder)
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"only pickled weights ({', '.join(pickles)}), never opened" if pickles else "no weights"
        raise ModelError(f"{source}: {folder.name} has {found}; save it as safetensors")
    pointer = next((path.name for path in files if is_lfs_pointer(path)), None)
    if pointer:
        raise ModelError(
            f"{source}: {folder.name}/{pointer} is a git-lfs pointer, not the weights; run `git lfs pull`"
        )
    return choose_variant(variants(folder), variant=variant)
