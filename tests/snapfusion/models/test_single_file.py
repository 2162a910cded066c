"""Single-file checkpoints: read as diffusers reads them, or refused by name."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from ldm_checkpoint import sd_shaped_bundle, write_checkpoint

from snapfusion.models.bundle import Bundle
from snapfusion.models.errors import ModelError
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.load import load, load_network, load_sizes
from snapfusion.models.save import save


@pytest.fixture(scope="module")
def sd1() -> Bundle:
    return sd_shaped_bundle()


@pytest.fixture(scope="module")
def checkpoint(sd1, tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sd1") / "model.safetensors", ldm_tensors(sd1))


def test_sd1_file_has_the_weights_of_its_model(sd1, checkpoint):
    loaded = load(f"{checkpoint}?size=128")
    assert loaded.fingerprint() == sd1.fingerprint()
    assert loaded.prediction_type == "epsilon"
    assert loaded.image_size == 128
    assert load_network(str(checkpoint), part="vae").config["block_out_channels"] == (32, 32, 64, 64)
    assert load_sizes(str(checkpoint)).side == 512


def test_sd1_file_equals_diffusers(sd1, checkpoint, tmp_path):
    save(sd_shaped_bundle(), tmp_path / "configs")
    options = {"config": str(tmp_path / "configs"), "local_files_only": True, "safety_checker": None}
    stock = StableDiffusionPipeline.from_single_file(checkpoint, **options)
    loaded = load(str(checkpoint))
    for name, network in loaded.networks.items():
        torch.testing.assert_close(network.state_dict(), getattr(stock, name).state_dict(), atol=0, rtol=0)


def test_sd2_file_is_read(tmp_path):
    model = sd_shaped_bundle(version=2)
    unread = {"text_projection": torch.eye(64), "logit_scale": torch.ones(())}
    unread = {f"cond_stage_model.model.{key}": value for key, value in unread.items()}
    path = write_checkpoint(tmp_path / "sd2.safetensors", ldm_tensors(model) | unread)
    with pytest.raises(ModelError, match="does not say whether it predicts eps"):
        load(str(path))
    loaded = load(f"{path}?prediction_type=v_prediction")
    fingerprint = loaded.fingerprint()
    assert fingerprint == model.fingerprint()
    assert loaded.prediction_type == "v_prediction"
    assert loaded.tokenizer.pad_token == "!"


@pytest.mark.parametrize("mark", ["metadata", "tensor"])
def test_marked_file_predicts_v(sd1, tmp_path, mark):
    tensors = ldm_tensors(sd1) | ({"v_pred": torch.zeros(0)} if mark == "tensor" else {})
    metadata = {"modelspec.prediction_type": "v"} if mark == "metadata" else {}
    path = write_checkpoint(tmp_path / "v.safetensors", tensors, metadata=metadata)
    assert load(str(path)).prediction_type == "v_prediction"


def test_averaged_weights_are_read_by_choice(sd1, tmp_path):
    tensors = ldm_tensors(sd1)
    unet = {key: value for key, value in tensors.items() if key.startswith("model.")}
    averaged = {"model_ema." + "".join(key.split(".")[1:]): value * 2 for key, value in unet.items()}
    path = write_checkpoint(tmp_path / "ema.safetensors", tensors | averaged)
    plain, ema = (load(f"{path}?ema={choice}").unet.state_dict() for choice in ("false", "true"))
    torch.testing.assert_close(ema["conv_in.weight"], plain["conv_in.weight"] * 2)
    with pytest.raises(ModelError, match="has no averaged weights"):
        load(f"{write_checkpoint(tmp_path / 'plain.safetensors', tensors)}?ema=true")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.diffusion_model.out.2.bias": None}, "unet has 1 missing tensors, such as conv_out.bias"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(5)}, "unet has 1 mismatched tensors"),
        (
            {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)},
            "conv_out.bias has values .* NaN",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "an inpainting model"),
        ({"conditioner.embedders.0.weight": torch.zeros(1)}, "is an SDXL checkpoint"),
        ({"betas": torch.linspace(0.1, 0.2, 1000)}, "its betas are not those"),
    ],
)
def test_unusable_file_is_refused_by_name(sd1, tmp_path, change, message):
    tensors = {key: value for key, value in (ldm_tensors(sd1) | change).items() if value is not None}
    path = write_checkpoint(tmp_path / "changed.safetensors", tensors)
    with pytest.raises(ModelError, match=message):
        load(str(path))


def test_vae_alone_is_refused(sd1, tmp_path):
    vae = {key: value for key, value in ldm_tensors(sd1).items() if key.startswith("first_stage_model.")}
    with pytest.raises(ModelError, match="has no UNet"):
        load(str(write_checkpoint(tmp_path / "vae.safetensors", vae)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"cos\nsystem\n(S'touch opened'\ntR.", r"only \.safetensors is read"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("a.safetensors", b"<html>", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path / name))
