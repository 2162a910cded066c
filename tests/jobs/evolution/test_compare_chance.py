"""Tests of the random baseline of an evolved architecture."""

import json

import pytest
from in_process import in_process
from latency_inputs import known_table
from scene_latents import encode_scenes

from jobs import compare_chance as job
from jobs.evaluation.settings import EvaluationSettings, PromptSettings, TimingSettings
from jobs.evolution.random_baseline import RandomBaseline
from jobs.evolution.settings import RandomBaselineSettings
from jobs.training.initial_weights import own_architecture
from jobs.training.settings import TrainerSettings, VpredSettings
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.settings import Sampler, SamplingSettings
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of
from snapfusion.training.settings import LoopSettings

ORIGIN = own_architecture("mini-v")
TABLE = known_table(ORIGIN)
EVOLVED = ORIGIN.without("mid_block.attentions.0").without("down_blocks.0.resnets.1")
SETTINGS = RandomBaselineSettings(
    count=1,
    training=VpredSettings(
        loop=LoopSettings(num_steps=1, global_batch=4, learning_rate=1e-4, warmup_steps=0),
        loader=LoaderSettings(held_out=0.3),
        trainer=TrainerSettings(micro_batch=4, cpus_per_worker=0.5, log_to=()),
    ),
    sampler=Sampler(steps=1),
    evaluation=EvaluationSettings(
        guidance=(2.0,),
        prompts=PromptSettings(limit=8),
        references=ReferencesSettings(count=8),
        samples=SamplesSettings(drawing=SamplingSettings(batch_size=8)),
        groups=4,
    ),
    timing=TimingSettings(turns=2),
)


def comparison(out, *, settings=SETTINGS, latents=""):
    return RandomBaseline(
        settings=settings, model="mini-v", evolved=EVOLVED, table=TABLE, latents_url=latents, out=str(out)
    )


def test_random_architectures_have_the_evolved_latency(tmp_path):
    found = comparison(tmp_path, settings=SETTINGS.model_copy(update={"count": 5})).architectures()
    assert list(found) == ["evolved", *(f"chance-{number}" for number in range(5))]
    assert found["evolved"] == EVOLVED
    latency_ms = TABLE.predict_ms(EVOLVED)
    for architecture in found.values():
        assert TABLE.predict_ms(architecture) == pytest.approx(latency_ms, rel=SETTINGS.slack)
    assert len({one.digest() for one in found.values()}) == 6


@pytest.fixture(scope="module")
def compared(ray_cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("chance")
    results = comparison(out, latents=encode_scenes(out)).compare(
        start=lambda name, parents: ({}, None), run=in_process
    )
    return out, results


@pytest.mark.slow
def test_all_start_from_the_same_weights(compared):
    out, results = compared
    assert results["architectures"].keys() == {"evolved", "chance-0"}
    for name, one in results["architectures"].items():
        trained, origin = load(str(out / "trained" / name)), load("mini-v").fingerprint()
        assert architecture_of(trained.unet).to_values() == one["architecture"]
        assert trained.fingerprint()["vae"] == origin["vae"]
        assert (one["measured"]["turns"], one["points"][0]["w"]) == (2, 2.0)
        assert json.loads((out / "first" / name / "made_of.json").read_text())["weights"] == origin


@pytest.mark.slow
def test_a_reading_compares_with_the_median(compared):
    _, results = compared
    (reading,) = results["readings"]
    points = {name: one["points"][0] for name, one in results["architectures"].items()}
    assert reading["clip"]["evolved"] == points["evolved"]["clip"][0]
    assert reading["clip"]["median"] == reading["clip"]["best"] == points["chance-0"]["clip"][0]
    # Of CLIP more is better, of FID less.
    assert reading["clip"]["worse"] == int(points["chance-0"]["clip"][0] < points["evolved"]["clip"][0])
    assert reading["fid"]["worse"] == int(points["chance-0"]["fid"][0] > points["evolved"]["fid"][0])


def test_a_run_without_an_evolution_is_refused(tmp_path, capsys):
    assert job.main(["--out", str(tmp_path), "--set", "evolution.begin=mini-v"]) == 2
    assert "architecture.json is no architecture" in capsys.readouterr().err
