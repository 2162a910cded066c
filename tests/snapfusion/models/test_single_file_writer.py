"""Single-file checkpoints as they are written: diffusers reads them back, or they are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from ldm_checkpoint import sd_shaped_bundle
from safetensors import safe_open

from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.errors import ModelError
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.load import load
from snapfusion.models.random_weights import random_bundle
from snapfusion.models.single_file_config import derive_configs
from snapfusion.models.single_file_writer import write_single_file
from snapfusion.models.unet import architecture_of, build_unet


def images_of(pipeline, latents):
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 2.5, "output_type": "np"}
    return pipeline("a large red circle at the top on a white background", latents=latents, **call).images


def test_diffusers_reads_a_file_with_equal_images(tmp_path):
    folder = str(BUNDLED["mini-v"])
    path = tmp_path / "mini.safetensors"
    written = write_single_file(load("mini-v"), path)
    assert (written.dtype, written.published_sizes) == (torch.float16, False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"torch_dtype": torch.float32, "safety_checker": None, "local_files_only": True}
    expected = images_of(StableDiffusionPipeline.from_pretrained(folder, **options), latents)
    found = images_of(StableDiffusionPipeline.from_single_file(path, config=folder, **options), latents)
    np.testing.assert_array_equal(found, expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("version", [1, 2])
def test_weights_and_prediction_type_are_read_back(version, tmp_path):
    model = replace(sd_shaped_bundle(version=version), prediction_type="v_prediction")
    path = tmp_path / "model.safetensors"
    # Random weights are not those of any float16.
    assert write_single_file(model, path).dtype == torch.float32
    loaded = load(f"{path}?size=128")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.prediction_type == "v_prediction"
    with safe_open(path, framework="pt") as file:
        kinds = {1: "stable-diffusion-v1", 2: "stable-diffusion-v2-768-v"}
        assert file.metadata()["modelspec.architecture"] == kinds[version]
        assert file.metadata()["modelspec.resolution"] == "128x128"


@pytest.mark.parametrize(("name", "captions"), [("sd15", 196), ("sd2", 24 * 12 + 4)])
def test_full_size_models_have_published_keys(name, captions):
    with torch.device("meta"):
        bundle = random_bundle(name)
    tensors = ldm_tensors(bundle)
    parts = {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.": captions}
    assert {part: sum(key.startswith(part) for key in tensors) for part in parts} == parts
    unet = convert_ldm_unet_checkpoint(tensors, bundle.unet.config)
    own = bundle.unet.state_dict()
    assert {key: value.shape for key, value in unet.items()} == {key: own[key].shape for key in own}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    configs = derive_configs(shapes, size=None, source="x")
    assert configs.unet["block_out_channels"] == (320, 640, 1280, 1280)


def table_3():
    bundle = load("mini-v")
    bundle.unet = build_unet(efficient_architecture(architecture_of(bundle.unet)))
    return bundle


def w_conditioned():
    bundle = tiny_bundle()
    bundle.unet = with_guidance_embedding(bundle.unet)
    return bundle


def with_token():
    bundle = tiny_bundle()
    bundle.tokenizer.add_tokens(["<cat>"])
    return bundle


def uneven():
    bundle = tiny_bundle()
    bundle.unet = UNet2DConditionModel.from_config({**bundle.unet.config, "layers_per_block": (1, 2)})
    return bundle


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (table_3, r"no stock architecture \(Table 3's, or an evolved one\)"),
        (w_conditioned, "is w-conditioned"),
        (with_token, "1 tokens of textual inversions, such as <cat>"),
        (uneven, "levels of its UNet have 1, 2 layers"),
    ],
)
def test_what_keys_cannot_hold_is_refused(make, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        write_single_file(make(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_overwritten(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(ModelError, match="exists and is not overwritten"):
        write_single_file(tiny_bundle(), path)
    assert path.read_bytes() == b"mine"
    with pytest.raises(ModelError, match=r"ends with \.safetensors is accepted"):
        write_single_file(tiny_bundle(), tmp_path / "model.ckpt")
