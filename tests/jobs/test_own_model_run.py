"""`run_pipeline --recipe own`, from a fine-tune as people have it to an evaluated student and a bundle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_checkpoint import sd_shaped_bundle, write_checkpoint
from safetensors.torch import save_file
from set_options import set_options

from jobs import run_pipeline
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from snapfusion.export.bundle import EXECUTORCH, open_bundle
from snapfusion.metrics.inception import Inception
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.load import load

TRIAL = Path(__file__).parents[2] / "docs/own_model_trial.yaml"
SIDE = 128
LICENCES = ("mobile.licence.weights=MIT", "mobile.licence.data=CC-BY-4.0")
FEATURES = "evaluation.samples.judging.features.weights"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Settings that name a single-file checkpoint of 128 px with a LoRA and a token, shards and captions."""
    folder, base = tmp_path_factory.mktemp("inputs"), sd_shaped_bundle(seed=3)
    conv_in, width = base.unet.conv_in.weight, base.text_encoder.config.hidden_size
    lora = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(1, *conv_in.shape[1:]),
        "lora_unet_conv_in.lora_up.weight": torch.ones(len(conv_in), 1, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(0.1),
    }
    save_file(lora, folder / "style.safetensors")
    save_file({"<mine>": torch.ones(2, width)}, folder / "mine.safetensors")
    model = write_checkpoint(folder / "tune.safetensors", ldm_tensors(base))
    options = f"size={SIDE}&lora={folder / 'style.safetensors'}:0.8&embedding={folder / 'mine.safetensors'}"
    noise = np.random.default_rng(0)
    rows = (
        ShardRow(
            image=to_png(noise.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)),
            caption=f"a photo, number {number}",
            url=f"http://origin/{number}",
        )
        for number in range(16)
    )
    write_shard(str(folder / "shards"), rows, index=0, extension="png", rows_per_shard=16)
    (folder / "captions.txt").write_text("".join(f"a photo of {number} <mine>\n" for number in range(8)))
    return [
        *(f"model={model}?{options}", f"source.url={folder / 'shards'}"),
        f"captions.url={folder / 'captions.txt'}",
    ]


def arguments(out: Path, settings) -> list[str]:
    return ["--recipe", "own", "--config", str(TRIAL), "--out", str(out), *set_options(settings)]


def test_the_trial_misses_inception_and_licences(inputs, tmp_path, capsys):
    assert run_pipeline.main([*arguments(tmp_path, inputs), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("missing  ") == 3
    assert run_pipeline.main(arguments(tmp_path / "run", inputs)) == 2
    assert f"{FEATURES} is the example" in capsys.readouterr().err
    assert not (tmp_path / "run/latents").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_from_a_single_file_to_student_and_bundle(inputs, ray_cluster, tmp_path, caplog):
    features = tmp_path / "inception.safetensors"
    save_file({**Inception().network.state_dict(), "fc.weight": torch.zeros(1008, 2048)}, features)
    command = arguments(tmp_path, [*inputs, *LICENCES, f"{FEATURES}={features}"])
    assert run_pipeline.main(command) == 0
    student = load(str(tmp_path / "staged-8"))
    assert (student.image_size, student.prediction_type) == (SIDE, "v_prediction")
    assert student.distillation["steps"] == 8
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert set(results["curves"]) == {"ddim-50", "ddim-8", "student-8"}
    assert len(results["curves"]["student-8"]["points"]) == 2
    assert open_bundle(tmp_path / "mobile").variants(runtime=EXECUTORCH) == ["executorch"]
    assert "- Data: CC-BY-4.0" in (tmp_path / "mobile/MODEL_CARD.md").read_text()
    assert (tmp_path / "report/index.html").is_file()
    # Nothing is left to do.
    caplog.clear()
    assert run_pipeline.main(command) == 0
    assert "nothing is left to do" in caplog.text
