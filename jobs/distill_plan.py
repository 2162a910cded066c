"""Distil in stages, each student from those before it: SnapFusion Sec. 4.1's plan, or a recipe's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs import distill_steps, finetune_vpred
from jobs.cli import Job, run
from jobs.exits import leave
from jobs.plans import OWN, PlanStage, needs_vpred
from snapfusion.training.steps import StepsSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_plan`."""
    return run("distill_plan", distill_plan, preview=preview, about=__doc__, argv=argv)


def distill_plan(job: Job) -> None:
    """Make the v model if a stage wants it, then each stage's student; what is there already is left."""
    if needs_vpred(job.recipe.stages):
        print("[vpred]", flush=True)
        finetune_vpred.finetune(job)
    for stage in job.recipe.stages:
        print(f"[{stage.name}]", flush=True)
        distill_steps.distill(of_stage(job, stage))


def of_stage(job: Job, stage: PlanStage) -> Job:
    """The job that makes a stage's student: the recipe's `distill`, with what the stage says of it."""

    def source(name: str) -> str:
        return job.recipe.model if name == OWN else name

    distill = job.recipe.distill
    told = {
        "name": stage.name,
        "teacher": source(stage.teacher),
        "student": source(stage.student),
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
    lines = finetune_vpred.preview(job) if needs_vpred(job.recipe.stages) else []
    for stage in job.recipe.stages:
        steps = of_stage(job, stage).recipe.distill.steps
        learnt = f"p = {steps.cfg_probability:g}{', told w' if steps.w_conditioned else ''}"
        lines += [f"{stage.name} ({learnt}): {line}" for line in distill_steps.preview(of_stage(job, stage))]
    return lines or ["nothing: this recipe has no plan"]


if __name__ == "__main__":
    leave(main())
