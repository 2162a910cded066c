"""Tests of architecture evolution on the miniature."""

import json
import math
from functools import partial

import pytest
import torch
from in_process import in_process
from latency_inputs import known_table
from scene_latents import encode_scenes
from set_options import set_options

from jobs import evolve_unet as job
from jobs.cli.in_run import resolve_training
from jobs.cli.job import Job
from jobs.evaluation.captions import captions_of
from jobs.evaluation.settings import PromptSettings
from jobs.evolution.search import Evolution, describe_round
from jobs.evolution.settings import EvolutionSettings
from jobs.recipes.registry import recipe_named
from jobs.reports.evolution_page import render_evolution
from jobs.training.initial_weights import own_architecture, with_architecture
from jobs.training.settings import RobustTrainingSettings, TrainerSettings
from jobs.training.spec import TrainingError
from pipelines.datasets.settings import SamplesSettings
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.metric_networks import MetricNetworks
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Sampler, SamplingSettings
from pipelines.tables.settings import Bounds
from pipelines.tables.table import open_table
from snapfusion.evolution.latency import LatencyError
from snapfusion.evolution.search import EvolutionError
from snapfusion.evolution.settings import RoundLimits
from snapfusion.models.architecture import Architecture
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of
from snapfusion.noise import noise_key
from snapfusion.training.settings import LoopSettings, SkipSettings

ORIGIN = own_architecture("mini-v")
TABLE = known_table(ORIGIN)
CAPTIONS = 4
SETTINGS = EvolutionSettings(
    pace=RoundLimits(removed=3, growths=0),
    prompts=PromptSettings(limit=CAPTIONS),
    sampler=Sampler(steps=1),
    guidance=2.0,
    samples=SamplesSettings(drawing=SamplingSettings(batch_size=CAPTIONS, images=True)),
    training=RobustTrainingSettings(
        skip=SkipSettings(attention=0.3, resnet=0.3),
        loop=LoopSettings(num_steps=2, global_batch=4, learning_rate=1e-4, warmup_steps=0),
        loader=LoaderSettings(held_out=0.3),
        trainer=TrainerSettings(micro_batch=4, cpus_per_worker=0.5, log_to=()),
    ),
)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return encode_scenes(tmp_path_factory.mktemp("run"))


OBJECTIVE_MS = TABLE.predict_ms(ORIGIN) - 7.0


def evolution(out, latents, *, objective_ms=OBJECTIVE_MS, table=TABLE, run=in_process, settings=SETTINGS):
    return Evolution(
        settings=settings,
        objective_ms=objective_ms,
        model="mini-v",
        latents_url=latents,
        table=table,
        out=str(out),
        start=lambda name, parents: ({}, None),
        run=run,
    )


@pytest.fixture(scope="module")
def evolved(local_training, latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("evolved")
    return out, evolution(out, latents).evolve()


def first_round(evolution):
    return next(iter(evolution._rounds()))


def decisions(history):
    return [finished.decision for finished in history.rounds]


def test_it_removes_until_the_objective_is_met(evolved):
    out, history = evolved
    assert [decision.action for decision in decisions(history)] == ["remove", "stop"]
    assert decisions(history)[0].before_ms == TABLE.predict_ms(ORIGIN)
    assert decisions(history)[1].before_ms <= OBJECTIVE_MS
    final = Architecture.parse(json.loads((out / "architecture.json").read_text()))
    assert TABLE.predict_ms(final) == decisions(history)[1].after_ms
    assert history.to_values() == json.loads((out / "history.json").read_text())


@pytest.mark.slow
def test_a_copied_block_has_its_originals_weights(latents, tmp_path):
    growing = SETTINGS.model_copy(update={"pace": RoundLimits(growths=1)})
    over = first_round(evolution(tmp_path, latents, objective_ms=1e3, settings=growing))
    assert over.decision.action == "copy"
    (name,) = over.decision.blocks
    able = [score for score in over.scores if ORIGIN.can_copy(score.block)]
    assert name == max(able, key=lambda score: score.value).block
    first = load(with_architecture("mini-v", over.decision.architecture, url=str(tmp_path / "first")))
    copied = first.unet.get_submodule(f"{name}+1").state_dict()
    for key, tensor in load("mini-v").unet.get_submodule(name).state_dict().items():
        assert torch.equal(copied[key], tensor)


def test_blocks_of_least_clip_per_millisecond_are_removed(evolved):
    first = evolved[1].rounds[0]
    values = {score.block: score.delta_clip[0] / score.delta_ms for score in first.scores}
    assert set(values) == {block.name for block in ORIGIN.blocks}
    blocks = first.decision.blocks
    assert list(blocks) == sorted(values, key=values.get)[: len(blocks)]
    assert all(score.captions == CAPTIONS for score in first.scores)


def test_scores_compare_equal_captions_and_noise(evolved):
    first = evolved[1].rounds[0]
    # By hand, without a table.
    captions = captions_of(SETTINGS.prompts)
    artist = SampleAndScore(
        model="mini-v",
        sampler=SETTINGS.sampler,
        sampling=SETTINGS.samples.drawing,
        metrics=SETTINGS.samples.judging,
        device=SETTINGS.samples.device,
    )
    keys = [noise_key("evaluation", 0, caption.id) for caption in captions]
    texts = [caption.text for caption in captions]
    score = first.scores[5]
    whole = artist.sample_and_score(texts, keys, w=2.0)["clip"]
    with skipping_blocks(artist.bundle.unet, [score.block]):
        left = artist.sample_and_score(texts, keys, w=2.0)["clip"]
    assert score.delta_clip[0] == pytest.approx(float((whole - left).mean()), abs=1e-6)
    assert score.clip == pytest.approx(float(left.mean()), abs=1e-6)


def test_each_round_trains_the_decided_architecture(evolved):
    out, history = evolved
    for number, decision in enumerate(decisions(history)[:-1], start=1):
        expected = decision.architecture
        trained = load(str(out / f"round-{number:02d}" / "trained"))
        assert architecture_of(trained.unet) == expected
        first = load(str(out / f"round-{number:02d}" / "first"))
        kept = next(block for block in expected.blocks if "+" not in block.name)
        before = load("mini-v" if number == 1 else str(out / f"round-{number - 1:02d}" / "trained"))
        for name, tensor in first.unet.get_submodule(kept.name).state_dict().items():
            assert torch.equal(tensor, before.unet.get_submodule(kept.name).state_dict()[name])
        assert trained.fingerprint()["unet"] != first.fingerprint()["unet"]


def test_a_finished_evolution_is_left_as_it_is(evolved, latents):
    out, history = evolved

    def nothing(items, stages):
        pytest.fail("drawn again")

    assert evolution(out, latents, run=nothing).evolve() == history
    other = SETTINGS.model_copy(update={"guidance": 3.0})
    with pytest.raises(TrainingError, match=r"of other settings: .*guidance is 2\.0 there, 3\.0 here"):
        evolution(out, latents, settings=other).evolve()


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_round_resumes_to_the_same_decision(evolved, latents, tmp_path):
    units = []

    def noted(items, stages, *, until=math.inf):
        for finished in in_process(items, stages):
            if len(units) >= until:
                raise Killed
            units.append(finished.manifest.unit)
            yield finished

    # Each unit is committed as it comes.
    at_once = SETTINGS.samples.model_copy(update={"bounds": Bounds(commit_seconds=0.0)})
    settings = SETTINGS.model_copy(update={"samples": at_once})

    with pytest.raises(Killed):
        evolution(tmp_path, latents, run=partial(noted, until=11), settings=settings).evolve()
    assert len(units) == 11
    # Only the first round: training is killed and resumed in its own tests.
    resumed = first_round(evolution(tmp_path, latents, run=noted, settings=settings))
    assert sorted(units) == sorted(set(units))
    # The file of the unit that was under way was there, and was adopted.
    assert len(units) == len(ORIGIN.blocks)
    assert len(open_table(f"{tmp_path}/round-00/scores").units) == 1 + len(ORIGIN.blocks)
    assert resumed.decision == decisions(evolved[1])[0]


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_refused(latents, tmp_path, monkeypatch):
    clip = MetricNetworks.clip

    def poisoned(self, images, texts):
        scores = clip(self, images, texts)
        scores[1] = float("nan")
        return scores

    monkeypatch.setattr(MetricNetworks, "clip", poisoned)
    with pytest.raises(EvolutionError, match="caption scene-1 with all blocks is not finite"):
        evolution(tmp_path, latents).evolve()


def test_an_indispensable_block_has_no_score(latents, tmp_path, monkeypatch, capsys):
    draw, lost = SampleAndScore.sample, "mid_block.attentions.0"

    def broken(self, texts, keys, *, w):
        latents = draw(self, texts, keys, w=w)
        gone = "forward" in vars(self.bundle.unet.get_submodule(lost))
        return latents * float("nan") if gone else latents

    monkeypatch.setattr(SampleAndScore, "sample", broken)
    first = first_round(evolution(tmp_path, latents))
    assert describe_round(first) in capsys.readouterr().out
    score = next(score for score in first.scores if score.block == lost)
    assert (score.delta_clip, score.clip, score.captions) == (None, None, 0)
    assert math.isinf(score.value)
    assert lost not in first.decision.blocks


def test_other_shapes_or_unreachable_objectives_are_refused(latents, tmp_path):
    with pytest.raises(LatencyError, match="tokens is 7 there, 24 here"):
        evolution(tmp_path, latents, objective_ms=9.0, table=known_table(ORIGIN, tokens=7)).evolve()
    wider = known_table(ORIGIN.changed(channels=(48, 64, 64), groups=8))
    with pytest.raises(LatencyError, match=r"embedding is 192 there, 96 here"):
        evolution(tmp_path / "wider", latents, objective_ms=9.0, table=wider).evolve()
    with pytest.raises(EvolutionError, match="no architecture takes 1 ms on a test: without any block"):
        evolution(tmp_path / "fast", latents, objective_ms=1.0).evolve()


def test_unusable_latents_are_refused_before_sampling(latents, tmp_path):
    none = SETTINGS.training.model_copy(update={"loader": LoaderSettings(held_out=1e-6)})
    settings = SETTINGS.model_copy(update={"training": none})
    with pytest.raises(TrainingError, match="none of the 16 rows"):
        evolution(tmp_path, latents, settings=settings).evolve()


def test_the_page_shows_rounds_scores_and_architectures(evolved):
    history = evolved[1]
    page = render_evolution(history, captions=(), images={})
    assert page.count("<svg") == 2
    for decision in decisions(history):
        for block in decision.blocks:
            assert block in page
    assert "without any" not in page


def refused(out, capsys, *assignments) -> str:
    """Output of the job that refuses its settings."""
    assert job.main(["--out", str(out), *set_options(assignments)]) == 2
    return capsys.readouterr().err


def test_a_wrong_setting_is_one_line(tmp_path, capsys):
    assert "--set evolution.latency_ms: it is null" in refused(tmp_path, capsys)
    phone = tmp_path / "phone.json"
    phone.write_text(json.dumps(known_table(ORIGIN, device="iPhone 14 Pro").to_values()))
    given = ("evolution.latency_ms=9", f"evolution.table={phone}")
    printed = refused(tmp_path, capsys, *given, 'evolution.device="iPhone 12"')
    assert "is of device 'iPhone 14 Pro', and evolution.device is 'iPhone 12'" in printed
    printed = refused(tmp_path, capsys, *given, "evolution.precision=float16")
    assert "is of precision 'float32', and evolution.precision is 'float16'" in printed
    phone.write_text('{"parts": 3}')
    assert "phone.json is no latency table" in refused(tmp_path, capsys, *given)


def test_a_run_table_of_another_machine_is_refused(tmp_path, capsys):
    path = tmp_path / "latency" / "torch-float32-cpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"table": known_table(ORIGIN, device="another machine").to_values()}))
    assert 'device is "another machine" there' in refused(tmp_path, capsys, "evolution.latency_ms=9")


def test_validation_references_of_the_run_are_resolved():
    recipe = recipe_named("sd15")
    here = Job(verb="evolve_unet", recipe=recipe, out="s3://bucket/run")
    resolved = resolve_training(recipe.evolution.training, here)
    assert resolved.validation.references == "s3://bucket/run/evaluation/references"
    assert resolved.skip == recipe.evolution.training.skip


def test_a_dry_run_says_what_an_action_costs(capsys):
    assert job.main(["--dry-run", "--recipe", "sd15", "--out", "nowhere"]) == 0
    printed = capsys.readouterr().out
    assert "2,000 captions of 50 steps at guidance 7.5" in printed
    assert "2 h 30 min" in printed
