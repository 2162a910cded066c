"""`publish`: a model and its card on a hub on this machine, or one line that says why not."""

import json
import re
import shutil

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import tiny_student
from hub_server import hub_server

from jobs import command
from snapfusion.models.card import Provenance, PublishedModel
from snapfusion.models.checksums import file_hash
from snapfusion.models.load import load
from snapfusion.models.save import save

BASE = PublishedModel(model="owner/sd", licence="MIT")
PROVENANCE = Provenance(
    objective="steps", models={"teacher": ("owner/sd", "ab12")}, table=("cd34", 3), base=BASE
)
DISTILLATION = {"steps": 4, "timesteps": [999, 749, 499, 249], "cfg_range": {"low": 2.0, "high": 5.0}}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a student, its record, and an evaluation of it and of another model."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "student/model"
    save(tiny_student(), folder, dtype=torch.float32, distillation=DISTILLATION, provenance=PROVENANCE)
    losses = {"before": {"vanilla": {"loss": 0.5}}, "after": {"vanilla": {"loss": 0.25}}}
    record = {
        "evaluation": losses,
        "distillation": DISTILLATION,
        "settings": {"loop": {"num_steps": 200}},
        "weight_files": {f"model/{UNET}": file_hash(folder / UNET)},
    }
    (run / "student/metrics.json").write_text(json.dumps(record))
    point = {"w": 2.0, "fid": [20.0, 19.0, 21.0], "clip": [0.31, 0.3, 0.32]}
    curve = {"sampler": {"steps": 4, "solver": "ddim"}, "decoder": None, "points": [point]}
    curves = {"own": {**curve, "model": "run:student"}, "other": {**curve, "model": "run:robust"}}
    results = {"curves": curves, "protocol": {"title": "COCO"}}
    ways = {
        "student": {"model": f"elsewhere/{run.name}/student/model", "steps": 4, "clip": 0.9},
        "teacher": {"model": "owner/sd", "steps": 50, "clip": 0.95},
    }
    fewer_steps = {"captions": 64, "guidance": 6.0, "scorer": "mini", "ways": ways}
    (run / "metrics.json").write_text(json.dumps({"fewer_steps": fewer_steps}))
    (run / "evaluation").mkdir()
    (run / "evaluation/results.json").write_text(json.dumps(results))
    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub at which this process has a token."""
    with hub_server(tmp_path / "hub") as (address, _):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield tmp_path / "hub"


def test_a_model_is_uploaded_with_its_card(run, hub, capsys):
    assert command.main(["publish", str(run / "student"), "me/tiny"]) == 0
    assert re.search(r"published: http://127.0.0.1:\d+/me/tiny/commit/0{40}\n", capsys.readouterr().out)
    # Its checksums are verified.
    assert load(str(hub / "me/tiny")).fingerprint() == load(str(run / "student")).fingerprint()
    card = (hub / "me/tiny/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "base_model": "owner/sd",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "snapfusion"],
    }
    for line in (
        "- Data: version 3 of the table whose settings have the SHA-256 `cd34`",
        "| vanilla | 0.5 | 0.25 |",
        "| teacher | 50 | 0.950 |",
        "| 2 | 20 (19 to 21) | 0.31 (0.3 to 0.32) |",
    ):
        assert line in card.splitlines()
    assert "DDIM in 4 steps, at t = 999, 749, 499, 249" in card
    assert "within 2 to 5, which it was distilled for" in card
    assert 'from_pretrained("me/tiny", ' in card
    assert "`own`: " in card
    assert "`other`: " not in card
    assert "stands in the records" not in card


def test_a_dry_run_lists_what_goes_up(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (run / "student/model/notes.txt").write_text("of mine")
    try:
        assert command.main(["publish", str(run / "student"), "me/tiny", "--dry-run"]) == 2
    finally:
        (run / "student/model/notes.txt").unlink()
    assert "notes.txt is not in SHA256SUMS" in capsys.readouterr().err
    assert command.main(["publish", str(run / "student"), "me/tiny", "--dry-run"]) == 0
    text = capsys.readouterr().out
    size = (run / "student/model" / UNET).stat().st_size
    assert f"{size:,}  {UNET}\n" in text
    assert re.search(r"bytes in 16 files\n\nREADME.md:\n\n---\n", text)


def copied(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run / "student/model", folder)
    return folder


def test_a_card_by_hand_is_kept(run, hub, tmp_path):
    folder = copied(run, tmp_path)
    (folder / "README.md").write_text(
        "---\nlanguage: en\n---\n# Mine\n\n## Licence\n\nNot stated.\n\n## End\n"
    )
    (tmp_path / "text").write_text("the terms")
    options = ["--licence", "CreativeML OpenRAIL-M", "--licence-file", str(tmp_path / "text")]
    assert command.main(["publish", str(folder), "me/mine", *options]) == 0
    card = (hub / "me/mine/README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"language": "en", "license": "creativeml-openrail-m"}
    assert "# Mine\n\n## Licence\n\nWeights: CreativeML OpenRAIL-M. " in card
    assert "\n## End\n" in card
    assert "\n## Sampler\n" in card
    # The weights are in no training's record.
    assert "## Figures" not in card
    assert (hub / "me/mine/LICENSE").read_text() == "the terms"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("MODEL tiny", "REPO 'tiny': OWNER/NAME is accepted"),
        ("MODEL me/ti--ny", "REPO 'me/ti--ny': OWNER/NAME is accepted"),
        ("MODEL a/b/c", "REPO 'a/b/c': OWNER/NAME is accepted"),
        ("MODEL me/tiny", "there is no token of a hub"),
        ("nowhere me/tiny --dry-run", "there is no model folder or file 'nowhere'"),
        ("mini?lora=a.safetensors me/tiny --dry-run", "a saved model is published, without options"),
        ("mini me/tiny --dry-run", "states no licence of its weights"),
        (
            "MODEL me/tiny --licence OpenRAIL++-M --dry-run",
            "requires a copy of its text; give --licence-file",
        ),
        ("MODEL me/tiny --licence-file /nowhere --dry-run", "--licence-file /nowhere: No such file"),
    ],
)
def test_a_mistake_is_one_line(words, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    words = words.replace("MODEL", str(run / "student"))
    assert command.main(["publish", *words.split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"publish: .*\n", error)
    assert message in error


def publish_in_vain(run, monkeypatch, capsys, *, address, offline=False):
    """The exit code, and the one line on stderr."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    code = command.main(["publish", str(run / "student"), "me/tiny"])
    error = capsys.readouterr().err
    assert re.fullmatch(r"publish: .*\n", error)
    return code, error


@pytest.mark.parametrize(
    ("refusal", "code", "message"),
    [
        (401, 2, "the hub refuses me/tiny with 401: it does not accept the token"),
        (403, 2, "the hub refuses me/tiny with 403: the token may not write there"),
        (503, 1, "the hub failed with 503"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(refusal, code, message, run, tmp_path, monkeypatch, capsys):
    with hub_server(tmp_path / "hub", refusal=refusal) as (address, _):
        found, error = publish_in_vain(run, monkeypatch, capsys, address=address)
    assert found == code
    assert message in error


@pytest.mark.parametrize(
    ("offline", "message"), [(False, "the hub cannot be reached"), (True, "HF_HUB_OFFLINE is set")]
)
def test_no_connection_is_one_line(offline, message, run, monkeypatch, capsys):
    address = "http://127.0.0.1:9"
    code, error = publish_in_vain(run, monkeypatch, capsys, address=address, offline=offline)
    assert code == 2
    assert message in error
