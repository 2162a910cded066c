"""Tests of the distillation schedules against the paper (Sec. 4.1, 5, App. D), and of their stages."""

from dataclasses import replace
from functools import reduce
from operator import getitem

import numpy as np
import pytest
import torch
from torch import nn

from jobs import distill_schedule, encode_latents
from jobs.cli import in_run, inputs
from jobs.cli.job import Job, resolve_recipe
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.stages import DistillationStage, paper_schedules
from jobs.recipes.verbs import initial_verbs
from jobs.training.sources import RECIPE_MODEL, VPRED_MODEL
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from snapfusion import distill
from snapfusion.schedule import Estimate, Schedule
from snapfusion.settings import SettingsError
from snapfusion.training.loop import new_state

# What the paper says, by where it says it.
SETTINGS = {
    "Sec. 5: AdamW's weight decay 0.01": ("loop.weight_decay", 0.01),
    "Sec. 5: global batch 2,048": ("loop.global_batch", 2048),
    "Fig. 7: guidance from [2, 14]": ("steps.cfg_range", {"low": 2.0, "high": 14.0}),
    "Fig. 7: CFG probability 0.1": ("steps.cfg_probability", 0.1),
    "Fig. 7(b): dynamic gamma": ("steps.gamma_rule", "dynamic"),
    "Fig. 7(b): of 0.2": ("steps.gamma", 0.2),
    "Fig. 6(b): the student is guided, not w-conditioned": ("steps.w_conditioned", False),
}
# name: teacher's steps, student's steps, teacher, first weights.
SD15 = {
    "Sec. 4.1: SD-v1.5 directly to 16 steps": ("teacher-16", 32, 16, "vpred", "vpred"),
    "Sec. 4.1: the efficient UNet by the same strategy": ("small-16", 32, 16, "vpred", "efficient"),
    # App. D: by a teacher distilled with CFG.
    "Sec. 4.1: then to 8 from its own weights of 16": ("staged-8", 16, 8, "teacher-16", "small-16"),
}
SD2 = {
    "Fig. 7(d): the student is SD-v2": ("teacher-16", 32, 16, "model", "model"),
    "Fig. 7(d): with 8 steps": ("staged-8", 16, 8, "teacher-16", "teacher-16"),
}
SELF = {"App. D: self-distillation from our 16-step UNet": ("self-8", 16, 8, "small-16", "small-16")}
PLAIN = {"App. D: from the 16-step SD-v1.5 baseline": ("plain-8", 16, 8, "vpred", "small-16")}
VANILLA = {"Fig. 4: 8 steps by the vanilla loss": ("vanilla-8", 16, 8, "small-16", "small-16")}
HALVINGS = ((64, 32), (32, 16), (16, 8))


def resolved(name, *settings) -> Job:
    return Job(verb="distill_schedule", recipe=resolve_recipe(name, settings), out="runs/x")


def stages(job: Job) -> dict:
    return {stage.name: in_run.stage_job(job, stage).recipe.distill for stage in job.recipe.stages}


def described(job: Job) -> list[tuple]:
    def short(source):
        return "model" if source == RECIPE_MODEL else source.removeprefix("run:").removesuffix("/model")

    return [
        (name, d.steps.k * d.steps.student_steps, d.steps.student_steps, short(d.teacher), short(d.student))
        for name, d in stages(job).items()
    ]


@pytest.mark.parametrize(("name", "expected"), [("sd15", SD15), ("sd2", SD2)])
def test_the_stages_are_the_papers_in_its_order(name, expected):
    assert described(resolved(name)) == list(expected.values())


@pytest.mark.parametrize("name", ["sd15", "sd2"])
@pytest.mark.parametrize("claim", SETTINGS)
def test_each_stage_has_the_papers_settings(claim, name):
    dotted, expected = SETTINGS[claim]
    for settings in stages(resolved(name)).values():
        assert reduce(getitem, dotted.split("."), settings.to_values()) == expected


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_the_optimizer_is_adamw(name):
    """Sec. 5, with its weight decay on all parameters."""
    optimizer = new_state(nn.Linear(2, 2), settings=resolved(name).recipe.distill.loop).optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_the_teacher_takes_ddim_steps(name, monkeypatch):
    """Sec. 5: two of them for each of the student's, which come one after the other on its grid."""
    calls = []
    plainly = distill.ddim_step
    monkeypatch.setattr(distill, "ddim_step", lambda *a, **k: calls.append(a) or plainly(*a, **k))
    start = {"interval": torch.tensor([0]), "schedule": Schedule()}
    for settings in stages(resolved(name)).values():
        calls.clear()
        steps = {"student_steps": settings.steps.student_steps, "k": settings.steps.k}
        distill.teacher_target(
            lambda z_t, t: Estimate(x=z_t, eps=z_t), torch.zeros(1, 4, 2, 2), **start, **steps
        )
        assert len(calls) == 2


@pytest.mark.parametrize(
    ("plan", "expected"), [("staged-self", SELF), ("staged-plain", PLAIN), ("staged-vanilla", VANILLA)]
)
def test_another_teacher_is_chosen_by_name(plan, expected):
    """App. D. The student's 16 steps are made as ever; a teacher without a student is not made."""
    found = described(resolved("sd15", f"schedule={plan}"))
    assert found == [SD15["Sec. 4.1: the efficient UNet by the same strategy"], *expected.values()]


def test_the_vanilla_student_has_no_guided_loss():
    found = stages(resolved("sd15", "schedule=staged-vanilla"))
    assert [settings.steps.cfg_probability for settings in found.values()] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["mini", "sd15", "sd2"])
@pytest.mark.parametrize(
    ("plan", "students", "w_conditioned"),
    [("cfg-aware-1", [16, 8, 4, 2, 1], False), ("w-conditioned-1", [32, 16, 8, 4, 2, 1], True)],
)
def test_schedules_go_down_to_one_step(name, plan, students, w_conditioned):
    job = resolved(name, f"schedule={plan}")
    found = described(job)
    assert [(teacher, student) for _, teacher, student, *_ in found] == [(2 * n, n) for n in students]
    assert [stage[3] for stage in found[1:]] == [stage[0] for stage in found[:-1]]
    for settings in stages(job).values():
        assert (settings.steps.cfg_probability, settings.steps.w_conditioned) == (1.0, w_conditioned)


def test_phases_of_a_schedule_are_those_of_its_stages():
    pcm = 'distill.consistency={"method": "pcm"}'
    job = resolved("mini", "schedule=phased", pcm)
    found = described(job)
    assert [settings.consistency.phases for settings in stages(job).values()] == [8, 4, 2, 1]
    assert {stage[3] for stage in found} == {"mini-v"}
    assert [stage[4] for stage in found] == ["mini-v", "phased-8", "phased-4", "phased-2"]
    with pytest.raises(SettingsError, match="8 phases do not divide 50 points"):
        stages(
            resolved(
                "mini", "schedule=phased", 'distill.consistency={"method": "pcm", "points": 50, "phases": 2}'
            )
        )


@pytest.mark.parametrize("name", ["mini", "sd15", "sd2"])
@pytest.mark.parametrize(
    ("plan", "p", "w_conditioned"), [("progressive", 0.0, False), ("w-conditioned", 1.0, True)]
)
def test_the_rivals_halve_the_steps_from_64(name, plan, p, w_conditioned):
    """Fig. 6(a), (b): progressive distillation by the vanilla loss, and the w-conditioned student."""
    job = resolved(name, f"schedule={plan}")
    found = described(job)
    assert [(teacher, student) for _, teacher, student, *_ in found] == list(HALVINGS)
    assert [stage[3] for stage in found[1:]] == [stage[0] for stage in found[:-1]]
    assert all(teacher == student for *_, teacher, student in found)
    for settings in stages(job).values():
        assert (settings.steps.cfg_probability, settings.steps.w_conditioned) == (p, w_conditioned)


@pytest.mark.parametrize("name", ["mini", "sd15", "sd2"])
def test_direct_distillation_takes_one_stage(name):
    """Fig. 6(a): the teacher distills only once, 16 to 8."""
    [(_, *steps, teacher, student)] = described(resolved(name, "schedule=direct"))
    assert steps == [16, 8]
    assert teacher == student


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_uses_only_earlier_models(name):
    recipe = recipe_named(name)
    assert recipe.stages == recipe.schedules[recipe.schedule]
    for plan in recipe.schedules.values():
        made = {"vpred", "efficient"}
        for stage in plan:
            needed = [source for source in (stage.teacher, stage.student) if source.startswith("run:")]
            assert {source.removeprefix("run:").split("/")[0] for source in needed} <= made
            made.add(stage.name)


@pytest.mark.parametrize("name", RECIPES)
def test_plans_can_share_a_run(name):
    """A student's name says everything of it: in whichever plan, it is the same."""
    found: dict[str, DistillationStage] = {}
    for plan in recipe_named(name).schedules.values():
        for stage in plan:
            assert found.setdefault(stage.name, stage) == stage


def test_all_else_is_as_the_recipe_says():
    recipe = recipe_named("mini").with_values(["distill.loop.num_steps=7", "distill.steps.gamma=0.5"])
    job = Job(verb="distill_schedule", recipe=recipe, out="runs/x")
    for settings in stages(job).values():
        assert settings.loop == recipe.distill.loop
        assert settings.steps.gamma == 0.5
        assert settings.steps.cfg_probability == recipe.distill.steps.cfg_probability


def test_only_needed_initial_models_are_made():
    def verbs(name, *options):
        return initial_verbs(recipe_named(name).with_values(options))

    assert verbs("sd15") == ["finetune_vpred", "train_efficient"]
    assert verbs("sd15", "schedule=direct") == ["finetune_vpred"]
    assert verbs("sd2") == verbs("mini") == []
    assert verbs("mini", "schedule=staged") == ["train_efficient"]


def test_sd2_is_distilled_from_the_recipes_model():
    recipe = recipe_named("sd2").with_values(["model=s3://bucket/sd2"])
    job = Job(verb="distill_schedule", recipe=recipe, out="runs/x")
    first = in_run.stage_job(job, job.recipe.stages[0])
    assert inputs.teacher_and_student(first) == ("s3://bucket/sd2", "s3://bucket/sd2")


def test_a_dry_run_describes_every_stage(capsys):
    assert distill_schedule.main(["--recipe", "sd15", "--dry-run", "--set", "schedule=staged"]) == 0
    printed = capsys.readouterr().out
    assert "would fine-tune" in printed
    assert "would give runs/demo/vpred/model the architecture table-3" in printed
    assert "staged-8 (p = 0.1): would distil 16 steps of runs/demo/teacher-16/model into 8" in printed
    assert "of runs/demo/small-16/model" in printed
    assert distill_schedule.main(["--recipe", "sd2", "--dry-run", "--set", "schedule=w-conditioned"]) == 0
    printed = capsys.readouterr().out
    assert "would fine-tune" not in printed
    assert "w-conditioned-8 (p = 1, w-conditioned): would distil 16 steps of" in printed


def test_the_last_stage_can_use_own_images(capsys, tmp_path):
    """Sec. 5: an internal set of high resolution, for more pleasing images."""
    job = resolved("sd15", "schedule=staged-own")
    assert described(job)[:3] == list(SD15.values())
    assert described(job)[3] == ("own-8", 16, 8, "teacher-16", "staged-8")
    tables = [inputs.distillation_table_url(in_run.stage_job(job, stage)) for stage in job.recipe.stages]
    assert tables == [*["runs/x/latents"] * 3, "runs/x/own"]
    mine = ShardRow(image=to_png(np.zeros((40, 40, 3), np.uint8)), caption="mine")
    write_shard(str(tmp_path), [mine], index=0, extension="png")
    options = ["--dry-run", "--set", "source.table=own", "--set", f"source.url={tmp_path}"]
    assert encode_latents.main(options) == 0
    assert f"would encode {tmp_path} into runs/demo/own" in capsys.readouterr().out


def test_an_unknown_schedule_is_refused(capsys):
    assert distill_schedule.main(["--recipe", "sd2", "--dry-run", "--set", "schedule=staged-self"]) == 2
    assert "accepted are direct, staged, staged-plain, progressive, w-conditioned" in capsys.readouterr().err


def test_settings_that_contradict_a_stage_are_refused():
    """L_ori on the grid needs an unguided pass, which a w-conditioned student does not make."""
    arguments = ["schedule=w-conditioned", "distill.steps.original_times=grid"]
    job = resolved("mini", "distill.steps.original_times=grid")
    job = replace(job, recipe=job.recipe.with_values(arguments))
    with pytest.raises(SettingsError, match="no unguided pass on the grid"):
        distill_schedule.preview(job)


def test_a_recipe_without_a_plan_says_so(capsys):
    assert distill_schedule.main(["--dry-run", "--set", "schedule=null"]) == 0
    assert "nothing: this recipe has no schedule" in capsys.readouterr().out


def test_a_stage_needs_a_teacher_and_a_student():
    with pytest.raises(ValueError, match="teacher"):
        DistillationStage.parse({"name": "a", "student": "mini-v", "student_steps": 8})


def test_the_plans_of_two_models_name_both():
    sources = {stage.student for stage in paper_schedules(RECIPE_MODEL, small=VPRED_MODEL)["staged"]}
    assert VPRED_MODEL in sources
    assert paper_schedules(RECIPE_MODEL, small=VPRED_MODEL)["staged-plain"][-1].teacher == RECIPE_MODEL


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_validation_uses_the_evaluations_metrics(name):
    recipe = RECIPES[name]()
    for settings in (recipe.vpred, recipe.distill):
        assert settings.validation.every is None
        assert settings.validation.judging == recipe.evaluation.samples.judging
        assert settings.validation.prompts.url == recipe.evaluation.prompts.url
        assert settings.validation.references == "run:evaluation/references"
