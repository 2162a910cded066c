"""The efficient model for phones at full size: Table 3's UNet, half-width decoder, random weights."""

import json
from pathlib import Path

import pytest
import torch
from memory_meter import MemoryMeter, available_gib
from set_options import set_options

from jobs import compile_mobile
from snapfusion.export.bundle import open_bundle
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of, build_unet

# Variants, and the GiB that they take.
CASES = {
    "coreml": (("mobile.executorch=[]",), 15),
    "executorch": (("mobile.coreml=[]",), 19),
    "onnx": (
        ("mobile.executorch=[]", "mobile.coreml=[]", 'mobile.onnx=["float32", "float16", "int8"]'),
        19,
    ),
}
SETTINGS = (
    "mobile.steps=8",
    'mobile.captions=["a photo of an astronaut riding a horse on mars"]',
    "mobile.licence.weights=none: random numbers",
    "mobile.licence.data=none",
)


def make_model(folder: Path) -> None:
    """A model of random numbers with Table 3's UNet, and its half-width decoder."""
    bundle = load("random:sd15-v")
    HalfDecoder.from_vae(bundle.vae).save(str(folder / "decoder"))
    torch.manual_seed(0)
    bundle.unet = build_unet(efficient_architecture(architecture_of(bundle.unet)))
    save(bundle, folder / "model")


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("runtime", CASES)
def test_the_efficient_model_compiles_at_full_size(runtime, tmp_path, capsys):
    settings, needed = CASES[runtime]
    if available_gib() < needed:
        pytest.skip(f"{available_gib():.1f} GiB of memory are free, {needed} are needed")
    make_model(tmp_path)
    options = set_options([*SETTINGS, *settings])
    with MemoryMeter() as meter, capsys.disabled():
        print()
        arguments = [str(tmp_path / "model"), "--recipe", "sd15", "--out", str(tmp_path), *options]
        assert compile_mobile.main(arguments) == 0
    variants = open_bundle(tmp_path / "mobile").manifest["variants"]
    with capsys.disabled():
        print(f"  {meter.seconds:.0f} s, {meter.peak_gib:.1f} GiB")
        print(json.dumps({name: figures_of(variant) for name, variant in variants.items()}, indent=2))
    if runtime == "executorch":
        assert list(variants) == ["executorch", "executorch-int8"]
        return
    if runtime == "onnx":
        # Above 2 GB, which float16 and the others are not.
        assert variants["onnx"]["modules"]["unet"]["files"] == ["onnx/unet.onnx", "onnx/unet.onnx.data"]
        assert variants["onnx-float16"]["modules"]["unet"]["files"] == ["onnx-float16/unet.onnx"]
        return
    halves = variants["coreml"]["modules"]["unet"]["packages"]
    assert len(halves) == 2
    assert all(half["weight_bytes"] < 2**30 for half in halves)
    assert len(variants["coreml-6bit"]["modules"]["unet"]["files"]) == 2


def figures_of(variant):
    """The line of the documents for a variant."""
    modules = {
        name: {"bytes": module["bytes"], "psnr_db": module["parity"]["psnr_db"]}
        for name, module in variant["modules"].items()
    }
    return modules | {"images": variant["images"]["psnr_db"]}
