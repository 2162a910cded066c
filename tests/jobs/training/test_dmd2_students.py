"""DMD2 students: trained on LATENTS and on PAIRS, saved, sampled; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_bundle
from diffusers import LCMScheduler
from in_process import in_process
from student_inputs import DISTILL, assembled, encode, inputs_of, save_trained, save_v_model, train_alone

from jobs import command
from jobs.cli.in_run import stage_job
from jobs.cli.job import Job, resolve_recipe
from jobs.evaluation.images import distillation_mismatch
from jobs.training.distillation import _check, assemble
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.loading.loader import count_trainable
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Generation
from pipelines.tables.table import TableError, open_table
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load
from snapfusion.schedule import Schedule
from snapfusion.training.dmd2 import FAKE_SCORE, GAN_HEAD
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import Dmd2Settings

DMD2 = Dmd2Settings(fake_updates=2)
REGRESSION = Dmd2Settings(fake_updates=1, gan=None, regression_weight=0.25)


def settings_of(dmd2, **changes):
    return DISTILL.model_copy(update={"dmd2": dmd2, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_v_model(tiny_bundle(), tmp_path_factory.mktemp("models") / "tiny-v", dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("run"), model=teacher, side=16, rows=12, detail=16, wide=1)


@pytest.fixture(scope="module")
def models(teacher):
    return dict.fromkeys(("teacher", "student"), load(teacher))


def pairs_at(guidance, *, teacher, latents):
    rows = [Caption(ordinal=row, id=f"c{row}", text=("red", "re")[row % 2]) for row in range(12)]
    return generate_pairs(
        PairsSettings(generation=Generation(steps=2, guidance=guidance, images=False), rows_per_unit=12),
        teacher=teacher,
        captions=rows,
        source="list",
        url=latents.url.replace("latents", f"pairs-{guidance}"),
        run=in_process,
    )


@pytest.fixture(scope="module")
def trained(teacher, latents, models, tmp_path_factory):
    """A training on LATENTS after three steps, its evaluation, and the folder of its student."""
    settings, folder = settings_of(DMD2), tmp_path_factory.mktemp("dmd2")
    record = _check(settings, latents, models)
    training = assembled(assemble, latents, settings, teacher=teacher, student=teacher)
    state, steps, _ = train_alone(training, settings.loop.model_copy(update={"num_steps": 3}))
    assert [step.network for step in steps] == [FAKE_SCORE, FAKE_SCORE, MODEL]
    save_trained(state, student=teacher, size=16, folder=folder, settings=settings, distillation=record)
    return state, training.evaluate(), folder / "model"


def test_all_networks_are_trained(trained, teacher):
    state, evaluation, _ = trained
    assert set(state.networks) == {MODEL, FAKE_SCORE, GAN_HEAD}
    begun = load(teacher).unet.state_dict()
    for name in (MODEL, FAKE_SCORE):
        after = state.networks[name].model.state_dict()
        assert not all(torch.equal(begun[weight], tensor) for weight, tensor in after.items())
    before, after = (evaluation[when]["guided"]["loss"] for when in ("before", "after"))
    assert 0.0 < after != before > 0.0


def test_student_is_sampled_on_its_grid(trained, tmp_path, capsys):
    folder = str(trained[2])
    bundle = load(folder)
    assert bundle.distillation["timesteps"] == [999, 749, 499, 249]
    assert command.main(["generate", "red", "--model", folder, "--out", str(tmp_path / "a.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 steps of consistency" in line
    assert command.main(["generate", "red", "--model", folder, "--steps", "5", "--out", "b.png"]) == 2
    assert "a student of 4 points can be sampled in 1 .. 4 steps" in capsys.readouterr().err
    assert distillation_mismatch(bundle, steps=4, solver="consistency", guidance=1.0) is None
    note = distillation_mismatch(bundle, steps=2, solver="consistency", guidance=1.0)
    assert note.startswith("distilled for 4 steps of consistency")


def test_stock_scheduler_takes_the_same_times(trained):
    scheduler = LCMScheduler.from_pretrained(trained[2] / "scheduler")
    assert scheduler.config.original_inference_steps == 4
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    card = (trained[2] / "README.md").read_text()
    assert "consistency in 4 steps, at t = 999, 749, 499, 249" in card
    assert "`LCMScheduler`" in card


def test_timesteps_of_another_grid_are_refused(trained, tmp_path):
    record = json.loads((trained[2] / "distillation.json").read_text())
    record["timesteps"] = [999, 759, 499, 259]
    folder = save_v_model(tiny_bundle(), tmp_path / "other", distillation=record)
    with pytest.raises(ModelError, match=r"the timesteps \[999, 759, 499, 259\], and its 4 steps are"):
        load(folder)


def test_regression_reads_pairs(teacher, latents, models):
    pairs, settings = pairs_at(1.75, teacher=teacher, latents=latents), settings_of(REGRESSION)
    assert settings.table_kind == "pairs"
    assert _check(settings, pairs, models)["method"] == "dmd2"
    inputs = inputs_of(pairs, settings, count=count_trainable, teacher=teacher, student=teacher)
    [training] = assemble(inputs, device=torch.device("cpu"))
    state, steps, _ = train_alone(training, settings.loop)
    assert [step.network for step in steps] == [FAKE_SCORE, MODEL] * 2
    assert set(state.networks) == {MODEL, FAKE_SCORE}
    other = REGRESSION.model_copy(update={"guidance": 3.0})
    with pytest.raises(TableError, match=r"was generated at guidance 1\.75, and dmd2\.guidance is 3"):
        _check(settings_of(other), pairs, models)
    # The GAN's table is LATENTS, whose latents are real.
    assert settings_of(DMD2).table_kind == "latents"
    with pytest.raises(TableError, match="holds pairs; latents is needed"):
        open_table(pairs.url, kind=settings_of(DMD2).table_kind)


def test_steps_divide_those_of_the_models_schedule(latents, models):
    shorter = {role: replace(bundle, schedule=Schedule(num_steps=500)) for role, bundle in models.items()}
    with pytest.raises(ValueError, match="8 steps do not divide the schedule's 500"):
        _check(settings_of(DMD2.model_copy(update={"steps": 8})), latents, shorter)


def test_identity_states_the_objective_that_is_used():
    identity = settings_of(DMD2).identity()
    assert identity.keys() == DISTILL.identity().keys() - {"steps"} | {"dmd2"}
    assert settings_of(DMD2, steps=DISTILL.steps.model_copy(update={"k": 4})).identity() == identity
    assert settings_of(DMD2).objective == "dmd2"


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [("mini", "mini-v", "mini-v"), ("sd15", "recipe:model", "run:vpred/model")],
)
def test_recipes_have_a_schedule_of_it(name, teacher, student):
    job = Job(verb="distill_schedule", recipe=resolve_recipe(name, ["schedule=dmd2"]), out="runs/x")
    (stage,) = job.recipe.stages
    settings = stage_job(job, stage).recipe.distill
    assert (settings.name, settings.teacher, settings.student) == ("dmd2-4", teacher, student)
    assert settings.dmd2 == Dmd2Settings()
    assert settings.loop.clip_norm == 10.0
    assert settings.loop.num_steps % (settings.dmd2.fake_updates + 1) == 0
    own = Job(
        verb="distill_schedule",
        recipe=resolve_recipe(name, ["schedule=dmd2", 'distill.dmd2={"guidance": 3.0}']),
        out="runs/x",
    )
    assert stage_job(own, own.recipe.stages[0]).recipe.distill.dmd2.guidance == 3.0
