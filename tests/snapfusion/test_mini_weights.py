"""What the bundled weights are worth: floors below the figures of MODEL_CARD.md."""

import pytest
from diffusers import StableDiffusionPipeline

from snapfusion.metrics.clip import load_scorer
from snapfusion.mini.measure import (
    MiniMeasurement,
    measure_oracle,
    measure_scorer,
    measure_teacher,
    measure_vae,
)
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.training.settings import MiniTraining
from snapfusion.mini.weights import WEIGHTS, altered_files, read_manifest
from snapfusion.models.load import load


@pytest.fixture(scope="module")
def teacher():
    return load("mini")


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(WEIGHTS / "scorer")


def test_files_are_those_of_the_manifest():
    assert altered_files() == []
    listed = set(read_manifest()["files"]) | {"manifest.json", "MODEL_CARD.md"}
    there = {path.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.rglob("*") if path.is_file()}
    assert there == listed


def test_recipe_is_accepted_by_the_code():
    assert MiniTraining.parse(read_manifest()["recipe"]).to_values() == read_manifest()["recipe"]


def test_bundle_is_small_and_has_no_pickles():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ""}


def test_oracle_reads_held_out_scenes():
    figures = measure_oracle(load_oracle(), count=200)
    assert figures["all"] >= 0.99


def test_scorer_prefers_the_true_caption(scorer):
    figures = measure_scorer(scorer, count=200)
    assert figures["one_attribute"] >= 0.97
    assert figures["recall_at_1"] >= 0.96


def test_vae_keeps_held_out_pictures(teacher):
    assert measure_vae(teacher, count=100)["psnr_db"] >= 34.0


def test_teacher_draws_what_the_caption_says(teacher, scorer):
    settings = MiniMeasurement(generated=40, steps=20)
    figures = measure_teacher(teacher, scorer=scorer, oracle=load_oracle(), w=2.0, settings=settings)
    assert figures["mean"] >= 0.95
    assert figures["all"] >= 0.85


def test_diffusers_opens_it():
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd", safety_checker=None)
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.scheduler.config.prediction_type == "epsilon"
