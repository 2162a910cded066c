"""The plan of Sec. 4.1 against the paper's words, and how a stage becomes a job."""

import pytest

from jobs import distill_plan
from jobs.cli import Job
from jobs.recipes import RECIPES, PlanStage, recipe_named

# What the paper says, by where it says it.
PAPER = {
    "Sec. 4.1: SD-v1.5 is distilled directly to 16 steps": ("teacher-16", 32, 16),
    "Sec. 4.1: so is the efficient UNet": ("small-16", 32, 16),
    "Sec. 4.1: then the efficient UNet to 8": ("student-8", 16, 8),
}
SETTINGS = {
    "Sec. 5: AdamW with weight decay 0.01": ("loop.weight_decay", 0.01),
    "Sec. 5: global batch 2,048": ("loop.global_batch", 2048),
    "Sec. 5: guidance from [2, 14]": ("steps.cfg_range", {"low": 2.0, "high": 14.0}),
    "Fig. 7: CFG probability 0.1": ("steps.cfg_probability", 0.1),
    "Fig. 7(b): dynamic gamma": ("steps.gamma_rule", "dynamic"),
    "Fig. 7(b): of 0.2": ("steps.gamma", 0.2),
}


def stages(name):
    job = Job(verb="distill_plan", recipe=recipe_named(name), out="runs/x")
    return {stage.name: distill_plan.of_stage(job, stage) for stage in job.recipe.plan}


def value(settings, dotted):
    for key in dotted.split("."):
        settings = settings[key]
    return settings


def test_the_stages_are_the_papers_in_its_order():
    found = [
        (
            name,
            job.recipe.distill.steps.k * job.recipe.distill.steps.student_steps,
            job.recipe.distill.steps.student_steps,
        )
        for name, job in stages("sd15").items()
    ]
    assert found == list(PAPER.values())


@pytest.mark.parametrize("said", SETTINGS)
def test_each_stage_has_the_papers_settings(said):
    dotted, expected = SETTINGS[said]
    for job in stages("sd15").values():
        assert value(job.recipe.distill.to_values(), dotted) == expected


def test_eight_steps_begin_at_the_sixteen_step_student_and_are_taught_by_the_sixteen_step_teacher():
    """Sec. 4.1: from its own 16-step weights. App. D: the best teacher is the one distilled with CFG."""
    last = stages("sd15")["student-8"].recipe.distill
    assert (last.student, last.teacher) == ("run:small-16/model", "run:teacher-16/model")


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_takes_only_what_was_made_before_it(name):
    recipe, made = recipe_named(name), {"vpred"}
    assert recipe.plan
    for stage in recipe.plan:
        for source in (stage.teacher, stage.student):
            if source.startswith("run:"):
                assert source.removeprefix("run:").split("/")[0] in made
        made.add(stage.name)


def test_all_else_is_as_the_recipe_says():
    recipe = recipe_named("mini").with_values(["distill.loop.num_steps=7", "distill.steps.gamma=0.5"])
    job = Job(verb="distill_plan", recipe=recipe, out="runs/x")
    for stage in recipe.plan:
        distill = distill_plan.of_stage(job, stage).recipe.distill
        assert distill.loop == recipe.distill.loop
        assert distill.steps.gamma == 0.5


def test_only_a_plan_that_begins_with_the_v_model_makes_it():
    assert distill_plan.wants_vpred(recipe_named("sd15"))
    assert not distill_plan.wants_vpred(recipe_named("mini"))


def test_dry_run_names_every_stage(capsys):
    assert distill_plan.main(["--recipe", "sd15", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would fine-tune" in said
    assert (
        "student-8: would distil 16 steps of runs/demo/teacher-16/model into 8 of runs/demo/small-16/model"
        in said
    )


def test_a_recipe_without_a_plan_says_so():
    job = Job(verb="distill_plan", recipe=recipe_named("mini").model_copy(update={"plan": ()}), out="runs/x")
    assert distill_plan.preview(job) == ["nothing: this recipe has no plan"]


def test_a_stage_needs_a_teacher_and_a_student():
    with pytest.raises(ValueError, match="teacher"):
        PlanStage.parse({"name": "a", "student": "mini-v", "student_steps": 8})
