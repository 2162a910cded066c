"""Other kinds of models: refused before their weights are read, with the kind in the message."""

import json
import shutil
from pathlib import Path

import pytest

from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    """The tiny model's configurations, without weights."""
    weights = shutil.ignore_patterns("*.safetensors", CHECKSUMS_FILE)
    return shutil.copytree(tiny_teacher, tmp_path / "model", ignore=weights)


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "an SDXL model"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "SD3, Flux"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "a ControlNet pipeline"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "an SDXL model"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ("unet/config.json", {"sample_size": None}, "sample_size None; set it to"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "its unet is a UNetMotionModel"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "its vae is a AutoencoderTiny"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "text_encoder is a T5"),
    ],
)
def test_other_kinds_are_refused(folder, file, changed, message):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ModelError, match=message):
        load(str(folder))


def test_control_net_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    with pytest.raises(ModelError, match="is a ControlNet"):
        load(str(tmp_path))


def test_absent_components_do_not_matter(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_encoder": [None, None]}))
    with pytest.raises(ModelError, match="has no weights"):
        load(str(folder))
