"""What the bundled weights are worth: floors below the figures of MODEL_CARD.md."""

import socket
import time

import pytest
from diffusers import StableDiffusionPipeline

from snapfusion.metrics.clip import load_scorer
from snapfusion.mini.measure import (
    Evaluator,
    SamplerConfig,
    measure_blocks,
    measure_floor,
    measure_oracle,
    measure_samples,
    measure_scorer,
    measure_vae,
)
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.training.settings import MiniTraining
from snapfusion.mini.weights import WEIGHTS, altered_files, read_manifest
from snapfusion.models.load import load

MODELS = {"sd": "mini", "sd-v": "mini-v"}


@pytest.fixture(scope="module")
def teacher():
    return load("mini")


@pytest.fixture(scope="module")
def judges():
    return Evaluator(scorer=load_scorer(WEIGHTS / "scorer"), oracle=load_oracle(), count=200)


def test_files_are_those_of_the_manifest():
    assert altered_files() == []
    listed = set(read_manifest()["files"]) | {"manifest.json", "MODEL_CARD.md"}
    there = {path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert there == listed


def test_recipe_is_accepted_by_the_code():
    assert MiniTraining.parse(read_manifest()["recipe"]).to_values() == read_manifest()["recipe"]


def test_bundle_is_small_and_has_no_pickles():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ""}


def test_weights_load_in_two_seconds_and_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

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


def test_oracle_reads_held_out_scenes(judges):
    assert measure_oracle(judges.oracle, count=200)["all"].value >= 0.99


def test_scorer_prefers_the_true_caption(judges):
    figures = measure_scorer(judges.scorer, count=200)
    assert figures["one_attribute"].value >= 0.97
    assert figures["recall_at_1"].value >= 0.96


def test_vae_keeps_held_out_pictures(teacher):
    assert measure_vae(teacher, count=100)["psnr_db"].value >= 34.0


@pytest.mark.parametrize("name", MODELS)
def test_teachers_draw_what_the_caption_says(teacher, judges, name):
    """At 8 steps, to save time. Two hundred pictures bias the distance upward, that of the floor as well."""
    drawing = SamplerConfig(solver="ddim", steps=8, w=2.0)
    figures = measure_samples(load(MODELS[name]), drawing, judges=judges, seed=0)
    assert figures["all"].value >= 0.9
    assert figures["fid"].value <= 3 * measure_floor(teacher, judges=judges)["fid_vae"].value


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_block_matters(name):
    """Every row of Table 3: without its blocks the velocity's error grows."""
    told = measure_blocks(load(MODELS[name]), count=200, seed=0)
    stages = ("Down-1", "Down-2", "Mid", "Up-1", "Up-2")
    assert set(told) == {f"{stage} {kind}" for stage in stages for kind in ("attention", "resnet")}
    assert {group: ends.value > 1.01 for group, ends in told.items()} == dict.fromkeys(told, True)


@pytest.mark.parametrize(("name", "kind"), [("sd", "epsilon"), ("sd-v", "v_prediction")])
def test_diffusers_opens_it(name, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / name, safety_checker=None)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.scheduler.config.prediction_type == kind
