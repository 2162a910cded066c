"""LoRAs: each format adds weight * alpha / rank * up @ down to each module, or is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from ldm_checkpoint import sd_shaped_bundle, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.models.bundle import Bundle
from snapfusion.models.errors import ModelError
from snapfusion.models.lora import merge_loras
from snapfusion.models.source import Lora

RANK = 4
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_out.0",
    "down_blocks.0.resnets.0.conv1",
    f"{BLOCK}.ff.net.0.proj",
)
TEXT = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)
MODULES = [*(("unet", name) for name in UNET), *(("text_encoder", name) for name in TEXT)]
ALPHAS = {module: float(number + 1) for number, module in enumerate(MODULES)}


@pytest.fixture(scope="module")
def base() -> Bundle:
    return sd_shaped_bundle()


@pytest.fixture(scope="module")
def matrices(base) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(down, up) of each module."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, name in MODULES:
        out, into, *kernel = base.networks[part].get_submodule(name).weight.shape
        down = torch.randn(RANK, into, *kernel, generator=generator)
        found[part, name] = down, torch.randn(out, RANK, *([1] * len(kernel)), generator=generator)
    return found


def kohya(part: str, name: str) -> tuple[str, str]:
    prefix, inner = ("lora_unet", "") if part == "unet" else ("lora_te", "text_model_")
    stem = f"{prefix}_{inner}{name.replace('.', '_')}"
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"


def peft(part: str, name: str) -> tuple[str, str]:
    stem = f"{part}.{'' if part == 'unet' else 'text_model.'}{name}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def diffusers(part: str, name: str) -> tuple[str, str]:
    stem = f"{part}.{'' if part == 'unet' else 'text_model.'}{name}"
    return f"{stem}.lora.down.weight", f"{stem}.lora.up.weight"


def old_diffusers(part: str, name: str) -> tuple[str, str]:
    stem = peft(part, name)[0].removesuffix(".lora_A.weight")
    for old, new in (
        (".to_q", ".processor.to_q_lora"),
        (".to_out.0", ".processor.to_out_lora"),
        (".q_proj", ".to_q_lora"),
        (".out_proj", ".to_out_lora"),
    ):
        stem = stem.replace(old, new) if stem.endswith(old) else stem
    stem = stem if stem.endswith("_lora") else f"{stem}.lora_linear_layer"
    return f"{stem}.down.weight", f"{stem}.up.weight"


FORMATS = {"kohya": kohya, "peft": peft, "diffusers": diffusers, "old diffusers": old_diffusers}


def write_lora(folder: Path, matrices: Mapping, *, form: str = "kohya", alphas: bool = True) -> Path:
    """Write a LoRA of all modules in one of the formats."""
    tensors = {}
    for module, (down, up) in matrices.items():
        keys = FORMATS[form](*module)
        tensors |= dict(zip(keys, (down, up), strict=True))
        if alphas:
            stem = keys[0].removesuffix(".lora_down.weight").removesuffix(".lora.down.weight")
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHAS[module])
    return write_checkpoint(folder / "lora.safetensors", tensors)


def merged(path: Path, *, weight: float = 1.0) -> Bundle:
    """The model with a LoRA in its weights."""
    bundle = sd_shaped_bundle()
    merge_loras(bundle, [Lora(path=str(path), weight=weight)], [path])
    return bundle


def check_weights(bundle: Bundle, base: Bundle, matrices: Mapping, *, weight: float, alphas: Mapping) -> None:
    """Compare all weights with base + weight * alpha / rank * up @ down."""
    for part in ("unet", "text_encoder"):
        expected = {key: value.clone() for key, value in base.networks[part].state_dict().items()}
        for (owner, name), (down, up) in matrices.items():
            if owner == part:
                delta = torch.einsum("or,r...->o...", up.flatten(1), down)
                expected[f"{name}.weight"] += weight * alphas[owner, name] / RANK * delta
        torch.testing.assert_close(bundle.networks[part].state_dict(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_each_module_keeps_its_own_alpha(base, matrices, tmp_path, form):
    bundle = merged(write_lora(tmp_path, matrices, form=form), weight=0.5)
    check_weights(bundle, base, matrices, weight=0.5, alphas=ALPHAS)


@pytest.mark.parametrize("form", FORMATS)
def test_alpha_is_the_rank_by_default(base, matrices, tmp_path, form, caplog):
    path = write_lora(tmp_path, matrices, form=form, alphas=False)
    with caplog.at_level("INFO", logger="snapfusion"):
        check_weights(merged(path), base, matrices, weight=1.0, alphas=dict.fromkeys(MODULES, RANK))


def test_alpha_of_adapter_metadata_is_read(base, matrices, tmp_path):
    pattern = {UNET[0]: 3.0}
    adapter = {"unet.lora_alpha": 8.0, "text_encoder.lora_alpha": 2.0, "unet.alpha_pattern": pattern}
    keys = {module: peft(*module) for module in MODULES}
    tensors = {
        key: value for module in MODULES for key, value in zip(keys[module], matrices[module], strict=True)
    }
    path = tmp_path / "peft.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(adapter)})
    alphas = {module: 8.0 if module[0] == "unet" else 2.0 for module in MODULES} | {("unet", UNET[0]): 3.0}
    check_weights(merged(path), base, matrices, weight=1.0, alphas=alphas)


def test_merged_loras_are_recorded(base, matrices, tmp_path):
    path = write_lora(tmp_path, matrices)
    bundle = merged(path, weight=0.5)
    (record,) = bundle.describe()["merged"]
    assert (record["lora"], record["weight"], len(record["sha256"])) == ("lora.safetensors", 0.5, 64)
    assert bundle.fingerprint()["unet"] != base.fingerprint()["unet"]
    assert "merged" not in base.describe()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_unet_no_such.lora_down.weight": (4, 32), "lora_unet_no_such.lora_up.weight": (32, 4)},
            "no module",
        ),
        ({"lora_te1_x.lora_down.weight": (4, 32)}, "is a LoRA for SDXL"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 32)}, "is a LoHa"),
        ({"lora_unet_conv_in.dora_scale": (4, 32)}, "is a DoRA"),
        ({"lora_unet_conv_in.lora_down.weight": (4, 36)}, "has not both matrices"),
        (
            {"lora_unet_conv_in.lora_down.weight": (4, 9), "lora_unet_conv_in.lora_up.weight": (32, 4)},
            "do not fit",
        ),
        ({"conv_in.weight": (32, 4)}, "is none of a LoRA"),
    ],
)
def test_other_files_are_refused(base, tmp_path, tensors, message):
    path = write_checkpoint(
        tmp_path / "x.safetensors", {key: torch.zeros(shape) for key, shape in tensors.items()}
    )
    with pytest.raises(ModelError, match=message):
        merge_loras(base, [Lora(path=str(path))], [path])
