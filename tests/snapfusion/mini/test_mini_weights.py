"""Quality of the bundled weights: bounds on the metrics of MODEL_CARD.md."""

import hashlib
import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from snapfusion.metrics.clip import load_scorer
from snapfusion.mini.measure import (
    Evaluator,
    SamplerConfig,
    held_out_batches,
    measure_blocks,
    measure_floor,
    measure_oracle,
    measure_samples,
    measure_scorer,
    measure_vae,
)
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.training.settings import MiniTraining
from snapfusion.mini.weights import WEIGHTS, read_manifest
from snapfusion.models.load import load

BATCHES = held_out_batches(200, split="test")
MEASURED = Path(__file__).parents[3] / "docs" / "miniature"
MODELS = {"sd": "mini", "sd-v": "mini-v"}
BOTH = [pytest.param("sd", marks=pytest.mark.slow), "sd-v"]


@pytest.fixture(scope="module")
def teacher():
    return load("mini")


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(scorer=load_scorer(WEIGHTS / "scorer"), oracle=load_oracle(), batches=BATCHES)


def test_files_match_the_manifest():
    hashes = {
        path.relative_to(WEIGHTS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "MODEL_CARD.md")
    }
    assert hashes == {name: file["sha256"] for name, file in read_manifest()["files"].items()}


def test_the_manifests_recipe_is_the_default():
    assert MiniTraining.parse(read_manifest()["recipe"]) == MiniTraining()


def test_the_card_quotes_its_measurements():
    figures = [
        json.loads((MEASURED / name).read_text())["figures"] for name in ("figures.json", "sweep.json")
    ]
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    for solver, name in (("ddim", "DDIM"), ("dpm++", "DPM-Solver++(2M)")):
        for steps in (16, 8, 4):
            points = [figures[1][f"sd-v {solver} {steps} w={w}"] for w in ("1", "1.5", "2", "3", "4", "6")]
            distances = " | ".join(f"{point['fid'][0]:.2f}" for point in points)
            scores = " | ".join(f"{point['clip'][0]:.3f} / {point['all'][0]:.3f}" for point in points)
            assert f"| {name} | {steps} | {distances} |" in card
            assert f"| {name} | {steps} | {scores} |" in card
    for model in ("sd", "sd-v"):
        value, low, high = figures[0][f"{model} ddim 50 w=2"]["fid"]
        assert f"|  | Fréchet distance | {value:.2f} | {low:.2f} – {high:.2f} |" in card


def test_guidance_matters_beyond_the_intervals():
    """It raises the CLIP score, and the distance falls from w = 1 and then rises. SnapFusion Fig. 4."""
    results = json.loads((MEASURED / "guidance.json").read_text())
    unguided, guided, strongly = results["curves"]["ddim-16"]["points"]
    assert guided["clip"][1] > unguided["clip"][2] + 0.05
    assert guided["fid"][2] < min(unguided["fid"][1], strongly["fid"][1])
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    for point in (unguided, guided, strongly):
        assert "{:.2f} ({:.2f} – {:.2f})".format(*point["fid"]) in card


def test_weights_are_small_and_not_pickled():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ""}


def test_weights_load_in_two_seconds_without_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("connected to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    seconds = []
    for _ in range(3):
        started = time.process_time()  # the machine may be busy with other things
        for name in MODELS.values():
            load(name)
        load_scorer(WEIGHTS / "scorer")
        load_oracle()
        seconds.append(time.process_time() - started)
    assert min(seconds) < 2.0


def test_oracle_classifies_held_out_scenes(evaluator):
    assert measure_oracle(evaluator.oracle, BATCHES)["all"].value >= 0.99


def test_scorer_prefers_the_true_caption(evaluator):
    metrics = measure_scorer(evaluator.scorer, BATCHES)
    assert metrics["one_attribute"].value >= 0.97
    assert metrics["recall_at_1"].value >= 0.96


def test_vae_reconstructs_held_out_images(teacher):
    assert measure_vae(teacher, BATCHES[:1])["psnr_db"].value >= 34.0


@pytest.mark.parametrize("name", BOTH)
def test_generated_images_match_their_captions(teacher, evaluator, name):
    """And guidance makes them, at 8 steps to save time. Two hundred images bias both distances upward."""
    model, sampler = load(MODELS[name]), SamplerConfig(solver="ddim", steps=8, w=2.0)
    metrics = measure_samples(model, sampler, evaluator=evaluator, seed=0)
    assert metrics["all"].value >= 0.9
    few = replace(evaluator, batches=held_out_batches(100, batch=50, split="test"))
    unguided = measure_samples(model, replace(sampler, w=1.0), evaluator=few, seed=0)
    assert metrics["clip"].low > unguided["clip"].high + 0.05
    assert metrics["fid"].value <= 3 * measure_floor(teacher, evaluator=evaluator)["fid_vae"].value


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_every_kind_of_block_matters(name):
    """Without the blocks of any row of Table 3 the velocity's error increases."""
    ratios = measure_blocks(load(MODELS[name]), BATCHES, seed=0)
    stages = ("Down-1", "Down-2", "Mid", "Up-1", "Up-2")
    assert set(ratios) == {f"{stage} {kind}" for stage in stages for kind in ("attention", "resnet")}
    assert {group for group, ratio in ratios.items() if ratio.value <= 1.0} == set()


@pytest.mark.parametrize(("name", "kind"), [("sd", "epsilon"), ("sd-v", "v_prediction")])
def test_diffusers_opens_it(name, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / name, safety_checker=None)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.scheduler.config.prediction_type == kind
