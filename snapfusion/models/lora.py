"""Merging LoRAs into the weights of a model: W + weight * alpha / rank * up @ down, for each adapted module.

Files of kohya, diffusers and peft are read. Each module keeps its own alpha and rank.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snapfusion.models.bundle import Bundle
from snapfusion.models.checkpoint_file import CheckpointFile
from snapfusion.models.checksums import file_hash
from snapfusion.models.distillation_record import DISTILLATION_METADATA, check_distillation
from snapfusion.models.errors import ModelError
from snapfusion.models.lora_files import ADAPTER_METADATA, LoraWeights
from snapfusion.models.source import Lora

_logger = logging.getLogger(__name__)
# The tail of a key, such as .lora_down.weight (kohya), _lora.down.weight (diffusers), .lora_A.weight (peft).
_ROLES = {
    "down": re.compile(r"[._](lora_down|lora\.down|lora_A(\.default)?|lora_linear_layer\.down)\.weight$"),
    "up": re.compile(r"[._](lora_up|lora\.up|lora_B(\.default)?|lora_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "base_model.model.": "unet",  # or the text encoder, if text_model follows
}
_OTHER_KINDS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude": "a DoRA",
    "lora_te1_": "a LoRA for SDXL",
    "lora_te2_": "a LoRA for SDXL",
    "text_encoder_2.": "a LoRA for SDXL",
    "transformer.": "a LoRA for a diffusion transformer",
}
# Names of diffusers' attention processors for the modules whose weights they change, written with "_".
_RENAMED = (("processor_", ""), ("self_attn_to_out", "self_attn_out_proj"), ("to_out_0", "to_out"))
_TEXT_ATTENTION = re.compile(r"self_attn_to_([qkv])$")


def merge_loras(bundle: Bundle, loras: Iterable[Lora], paths: Iterable[Path]) -> None:
    """Add LoRAs to the weights of a model in float32, in order, and record them in `bundle.merged`.

    One that was distilled to take fewer steps says so, and how the model is sampled with it.

    Args:
        bundle: the model; its networks become float32.
        loras: with their weights.
        paths: the local file of each.

    Raises:
        ModelError: if a file is not a LoRA of this model, naming the module that does not fit.
    """
    for lora, path in zip(loras, paths, strict=True):
        file = CheckpointFile(path, source=lora.path)
        _refuse_other_kinds(file, lora=lora)
        adapters = _adapters(file.tensors(), lora=lora)
        targets = {part: _targets(bundle.networks[part].float()) for part in ("unet", "text_encoder")}
        adapter_alpha = _adapter_alphas(file.metadata, lora=lora)
        num_assumed = 0
        for (part, name), tensors in adapters.items():
            module = targets[part].get(name)
            if module is None:
                raise ModelError(
                    f"{lora.path}: there is no module {name} in the {part}: a LoRA of another model"
                )
            alpha = tensors.get("alpha", adapter_alpha(part, name))
            num_assumed += alpha is None
            _merge(module, tensors, alpha=alpha, weight=lora.weight, where=f"{lora.path}: {part} {name}")
        if num_assumed:
            _logger.info("%s does not say alpha of %d modules; the rank is taken", lora.path, num_assumed)
        bundle.merged.append({"lora": path.name, "sha256": file_hash(path), "weight": lora.weight})
        if (distillation := _distillation(bundle, file, lora=lora)) is not None:
            bundle.distillation = distillation


def merge_matrices(unet: nn.Module, lora: LoraWeights) -> None:
    """Add the matrices of a LoRA to the weights of its UNet, in place."""
    for name, down in lora.down.items():
        module: Any = unet.get_submodule(name)
        _merge(module, {"down": down, "up": lora.up[name]}, alpha=lora.alpha, weight=1.0, where=name)


def describe_lora(lora: Lora, path: Path) -> dict[str, Any]:
    """Describe a LoRA file: the number of its modules, and their ranks and alphas, each once.

    Args:
        lora: with its weight.
        path: its local file.

    Raises:
        ModelError: if it is not a LoRA.
    """
    file = CheckpointFile(path, source=lora.path)
    adapters, adapter_alpha = _adapters(file.tensors(), lora=lora), _adapter_alphas(file.metadata, lora=lora)
    alphas = [tensors.get("alpha", adapter_alpha(*name)) for name, tensors in adapters.items()]
    return {
        "lora": path.name,
        "weight": lora.weight,
        "modules": len(adapters),
        "ranks": sorted({len(tensors["down"]) for tensors in adapters.values()}),
        "alphas": sorted({float(alpha) for alpha in alphas if alpha is not None}),
        "modules_without_alpha": sum(alpha is None for alpha in alphas),
    }


def _distillation(bundle: Bundle, file: CheckpointFile, *, lora: Lora) -> dict[str, Any] | None:
    """The record of a LoRA that was distilled; None for any other."""
    if (text := file.metadata.get(DISTILLATION_METADATA)) is None:
        return None
    try:
        record = dict(json.loads(text))
    except (ValueError, TypeError):
        raise ModelError(f"{lora.path}: its {DISTILLATION_METADATA} is not a JSON object") from None
    predicts = record.get("prediction_type", bundle.prediction_type)
    if predicts != bundle.prediction_type:
        raise ModelError(
            f"{lora.path} was distilled in a model with {predicts}, and {bundle.source} has "
            f"{bundle.prediction_type}"
        )
    return check_distillation(record, schedule=bundle.schedule, where=lora.path)


def _refuse_other_kinds(file: CheckpointFile, *, lora: Lora) -> None:
    for mark, kind in _OTHER_KINDS.items():
        if any(key.startswith(mark) or f".{mark}" in key for key in file.shapes):
            raise ModelError(f"{lora.path} is {kind}; a LoRA of Stable Diffusion 1 or 2 is accepted")


def _adapters(tensors: Mapping[str, Tensor], *, lora: Lora) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Group the tensors of a file by network and module; names of modules are written with "_"."""
    adapters: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        role = next((role for role, tail in _ROLES.items() if tail.search(key)), None)
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if role is None or prefix is None:
            raise ModelError(f"{lora.path}: tensor {key} is none of a LoRA of Stable Diffusion 1 or 2")
        name = _ROLES[role].sub("", key.removeprefix(prefix)).replace(".", "_")
        part = "text_encoder" if name.startswith("text_model_") else _PREFIXES[prefix]
        adapters[part, _module_name(name)][role] = value
    incomplete = next((name for name, parts in adapters.items() if not {"down", "up"} <= parts.keys()), None)
    if incomplete or not adapters:
        raise ModelError(
            f"{lora.path}: {incomplete[1] if incomplete else 'it'} has not both matrices of a LoRA"
        )
    return adapters


def _module_name(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return _TEXT_ATTENTION.sub(r"self_attn_\1_proj", name.removesuffix("_lora").removeprefix("text_model_"))


def _targets(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Map the name of each linear layer and convolution, with "_" for ".", to the module."""
    return {
        _module_name(name.replace(".", "_")): module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _adapter_alphas(metadata: Mapping[str, str], *, lora: Lora) -> Callable[[str, str], float | None]:
    """Read peft's metadata, as diffusers writes it; return a function of network and module to alpha."""
    try:
        adapter = dict(json.loads(metadata.get(ADAPTER_METADATA, "{}")))
    except (ValueError, TypeError):
        raise ModelError(f"{lora.path}: its {ADAPTER_METADATA} is not a JSON object") from None
    if any(adapter.get(f"{part}use_rslora") for part in ("", "unet.", "text_encoder.")):
        raise ModelError(f"{lora.path} is a rank-stabilized LoRA (use_rslora), which is not supported")

    def alpha(part: str, name: str) -> float | None:
        pattern = adapter.get(f"{part}.alpha_pattern", adapter.get("alpha_pattern")) or {}
        own = {_module_name(key.replace(".", "_")): value for key, value in pattern.items()}
        return own.get(name, adapter.get(f"{part}.lora_alpha", adapter.get("lora_alpha")))

    return alpha


def _merge(
    module: nn.Linear | nn.Conv2d,
    tensors: Mapping[str, Tensor],
    *,
    alpha: Tensor | float | None,
    weight: float,
    where: str,
) -> None:
    """Add weight * alpha / rank * up @ down to the module's weight; without alpha it is the rank."""
    down, up, own = tensors["down"].flatten(1), tensors["up"].flatten(1), module.weight
    rank = len(down)
    if up.shape != (len(own), rank) or down.shape[1] != own[0].numel():
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise ModelError(
            f"{where}: its matrices {shapes} do not fit the weight {tuple(own.shape)}; a LoRA of this model, "
            "or of one with its sizes, is accepted"
        )
    scale = 1.0 if alpha is None else float(alpha) / rank
    with torch.no_grad():
        own += weight * scale * (up @ down).reshape(own.shape)
