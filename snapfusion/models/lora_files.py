"""Writing a LoRA of a UNet: for diffusers' `load_lora_weights`, and in the keys of kohya's scripts.

FOLDER/pytorch_lora_weights.safetensors     as diffusers and peft name modules
FOLDER/kohya.safetensors                    as kohya does, which other programs read
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.models.distillation_record import DISTILLATION_METADATA

DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"
"""Key under which diffusers keeps peft's settings in a file's header."""


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """A LoRA of a UNet: alpha / rank * up @ down is added to the weight of each module.

    Attributes:
        alpha: of every module.
        down: by module, float32 [rank,in], or [rank,in,k,k] for a convolution.
        up: by module, float32 [out,rank], or [out,rank,1,1].
    """

    alpha: float
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Of every module."""
        return len(next(iter(self.down.values())))


def write_lora(
    folder: Path, lora: LoraWeights, *, dtype: torch.dtype, distillation: Mapping[str, Any] | None
) -> None:
    """Write both files into a folder, which is made.

    Args:
        folder: of the files.
        lora: the matrices.
        dtype: that they are saved in.
        distillation: record of the step distillation that the LoRA makes; its files then say how a model with
            it is sampled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {} if distillation is None else {DISTILLATION_METADATA: json.dumps(distillation, sort_keys=True)}
    matrices = {
        name: (lora.down[name].to(dtype).contiguous(), lora.up[name].to(dtype).contiguous())
        for name in sorted(lora.down)
    }
    _write(folder / DIFFUSERS_FILE, _peft_tensors(matrices), record | _peft_metadata(lora))
    _write(folder / KOHYA_FILE, _kohya_tensors(matrices, alpha=lora.alpha), record | _kohya_metadata(lora))


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})


def _peft_tensors(matrices: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"unet.{name}.{role}.weight": matrix
        for name, pair in matrices.items()
        for role, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def _peft_metadata(lora: LoraWeights) -> dict[str, str]:
    # diffusers passes these to peft's LoraConfig, so only what every version of it knows.
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.down)}
    prefixed = {f"unet.{name}": value for name, value in settings.items()}
    return {ADAPTER_METADATA: json.dumps(prefixed, sort_keys=True)}


def _kohya_tensors(matrices: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float) -> dict[str, Tensor]:
    tensors = dict[str, Tensor]()
    for name, (down, up) in matrices.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def _kohya_metadata(lora: LoraWeights) -> dict[str, str]:
    names = {"network_module": "networks.lora", "network_dim": lora.rank, "network_alpha": lora.alpha}
    return {f"ss_{name}": str(value) for name, value in names.items()}
