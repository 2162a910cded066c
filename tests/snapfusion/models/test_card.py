"""Model cards: the header that hubs read, code that runs, and nothing that is not recorded."""

import re
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import tiny_bundle
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from stock_comparison import save_table_3_student

from snapfusion.models.card import CARD, Provenance, PublishedModel, model_card
from snapfusion.models.load import load
from snapfusion.models.save import save

DISTILLATION = {"steps": 4, "teacher_steps": 8, "cfg_range": {"low": 2.0, "high": 5.0}}


@pytest.fixture(scope="module")
def bundle():
    return tiny_bundle()


def card_of(bundle, *, model="owner/name", licence=None, source="/home/me/runs/vpred/model"):
    base = PublishedModel(model=model, licence=licence)
    provenance = Provenance(
        objective="steps", models={"teacher": (source, "ab12")}, table=("cd34", 3), base=base
    )
    return model_card(bundle, provenance=provenance)


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (None, {}),
        (" ", {}),
        ("Apache-2.0 (the miniature of this repository)", {"license": "apache-2.0"}),
        ("CreativeML OpenRAIL-M", {"license": "creativeml-openrail-m"}),
        ("Ours: ask first", {"license": "other", "license_name": "Ours: ask first"}),
    ],
)
def test_header_has_the_licence_that_is_stated(bundle, licence, expected):
    card = card_of(bundle, licence=licence)
    assert header_of(card) == expected | {
        "base_model": "owner/name",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "snapfusion"],
    }
    stated = licence is not None and licence.strip()
    assert (f"Weights: {licence}." in card) == bool(stated)
    assert ("is not stated: write it here, and set `mobile.licence.weights` for" in card) != bool(stated)


@pytest.mark.parametrize("model", ["/models/sd15", "mini", "s3://bucket/sd15"])
def test_only_a_model_on_a_hub_is_a_base_model(bundle, model):
    assert "base_model" not in header_of(card_of(bundle, model=model))


def test_lineage_is_what_is_recorded(bundle):
    merged = [{"lora": "style.safetensors", "sha256": "ef56", "weight": 0.8}]
    card = card_of(replace(bundle, distillation=DISTILLATION, merged=merged))
    for line in (
        "# Text to image in 4 steps",
        "- Begins with: `owner/name`",
        "- Teacher: `vpred/model`, UNet weights SHA-256 `ab12`",
        "- Data: version 3 of the table whose settings have the SHA-256 `cd34`",
        "- Distilled for 4 DDIM steps of 8 DDIM steps of the teacher",
        "- Guidance in distillation: 2 to 5",
        "- Merged: lora `style.safetensors`, sha256 `ef56`, weight `0.8`",
    ):
        assert line in card.splitlines()
    assert "/home/me" not in card


def test_what_is_not_known_is_not_said(bundle):
    card = model_card(bundle)
    assert header_of(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "What it was trained on is not recorded here." in card
    assert "Distilled" not in card


def save_stock(folder):
    save(replace(load("mini-v"), distillation=None), folder)


@pytest.mark.parametrize(("make", "flag"), [(save_stock, False), (save_table_3_student, True)])
def test_code_of_a_card_generates_an_image(make, flag, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "FOLDER")
    card = (tmp_path / "FOLDER" / CARD).read_text()
    assert ("trust_remote_code" in card) == flag
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    torch.manual_seed(0)
    exec(code.replace("num_inference_steps=50", "num_inference_steps=4"), {})
    with Image.open("image.png") as image:
        assert image.size == (32, 32)
        assert max(high - low for low, high in image.convert("RGB").getextrema()) > 50


def test_a_card_may_be_edited(tmp_path):
    save(tiny_bundle(), tmp_path / "model")
    with (tmp_path / "model" / CARD).open("a") as file:
        file.write("Trained for a friend.\n")
    assert load(str(tmp_path / "model")).image_size
