"""Distil in stages, each student from those before it: SnapFusion Sec. 4.1's plan, or a recipe's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs import distill_steps, finetune_vpred
from jobs.cli import Job, run
from jobs.exits import leave
from jobs.recipes import PlanStage, Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_plan`."""
    return run("distill_plan", distill_plan, preview=preview, about=__doc__, argv=argv)


def distill_plan(job: Job) -> None:
    """Make the v model if a stage wants it, then each stage's student; what is there already is left."""
    if wants_vpred(job.recipe):
        print("[vpred]", flush=True)
        finetune_vpred.finetune(job)
    for stage in job.recipe.plan:
        print(f"[{stage.name}]", flush=True)
        distill_steps.distill(of_stage(job, stage))


def of_stage(job: Job, stage: PlanStage) -> Job:
    """The job that makes a stage's student: the recipe's `distill`, with what the stage says of it."""
    distill = job.recipe.distill
    steps = distill.steps.model_copy(update={"student_steps": stage.student_steps, "k": stage.k})
    told = {"name": stage.name, "teacher": stage.teacher, "student": stage.student, "steps": steps}
    recipe = job.recipe.model_copy(update={"distill": distill.model_copy(update=told)})
    return replace(job, verb="distill_steps", recipe=recipe)


def wants_vpred(recipe: Recipe) -> bool:
    """Whether a stage begins with the model that `jobs.finetune_vpred` makes."""
    sources = {source for stage in recipe.plan for source in (stage.teacher, stage.student)}
    return "run:vpred/model" in sources


def preview(job: Job) -> list[str]:
    """What each stage would do."""
    lines = finetune_vpred.preview(job) if wants_vpred(job.recipe) else []
    for stage in job.recipe.plan:
        lines += [f"{stage.name}: {line}" for line in distill_steps.preview(of_stage(job, stage))]
    return lines or ["nothing: this recipe has no plan"]


if __name__ == "__main__":
    leave(main())
