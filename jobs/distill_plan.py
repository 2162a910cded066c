"""Distil in stages, each student from those before it: SnapFusion Sec. 4.1's plan, or a recipe's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs import distill_steps, finetune_vpred, train_efficient
from jobs.cli import Body, Job, Preview, run
from jobs.exits import leave
from jobs.plans import EFFICIENT, VPRED, PlanStage, needs
from snapfusion.training.steps import StepsSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_plan`."""
    return run("distill_plan", distill_plan, preview=preview, about=__doc__, argv=argv)


def distill_plan(job: Job) -> None:
    """Make the models that stages begin with, then each stage's student; what is there already is left."""
    for name, make, _ in first_models(job):
        print(f"[{name}]", flush=True)
        make(job)
    for stage in job.recipe.stages:
        print(f"[{stage.name}]", flush=True)
        distill_steps.distill(of_stage(job, stage))


def first_models(job: Job) -> list[tuple[str, Body, Preview]]:
    """What makes the models that no stage makes: the v model, and the efficient one, made of it."""
    stages, found = job.recipe.stages, list[tuple[str, Body, Preview]]()
    efficient = needs(stages, EFFICIENT)
    if needs(stages, VPRED) or (efficient and job.recipe.efficient.begin == VPRED):
        found.append(("vpred", finetune_vpred.finetune, finetune_vpred.preview))
    if efficient:
        found.append(("efficient", train_efficient.train_efficient, train_efficient.preview))
    return found


def of_stage(job: Job, stage: PlanStage) -> Job:
    """The job that makes a stage's student: the recipe's `distill`, with what the stage says of it."""
    distill = job.recipe.distill
    told = {
        "name": stage.name,
        "teacher": stage.teacher,
        "student": stage.student,
        "table": stage.table or distill.table,
        "steps": _steps(distill.steps, stage=stage),
    }
    recipe = job.recipe.model_copy(update={"distill": distill.model_copy(update=told)})
    return replace(job, verb="distill_steps", recipe=recipe)


def _steps(steps: StepsSettings, *, stage: PlanStage) -> StepsSettings:
    """What a stage's student learns.

    Raises:
        SettingsError: if the recipe's settings do not go with the stage's.
    """
    said = {"cfg_probability": stage.cfg_probability, "w_conditioned": stage.w_conditioned}
    told = {name: value for name, value in said.items() if value is not None}
    return StepsSettings.parse(
        {**steps.to_values(), "student_steps": stage.student_steps, "k": stage.k, **told}
    )


def preview(job: Job) -> list[str]:
    """What each stage would do."""
    lines = [line for _, _, preview in first_models(job) for line in preview(job)]
    for stage in job.recipe.stages:
        steps = of_stage(job, stage).recipe.distill.steps
        learnt = f"p = {steps.cfg_probability:g}{', told w' if steps.w_conditioned else ''}"
        lines += [f"{stage.name} ({learnt}): {line}" for line in distill_steps.preview(of_stage(job, stage))]
    return lines or ["nothing: this recipe has no plan"]


if __name__ == "__main__":
    leave(main())
