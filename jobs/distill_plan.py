"""Distil in stages, each student from those before it, by the recipe's schedule. SnapFusion Sec. 4.1."""

from __future__ import annotations

from collections.abc import Sequence

from jobs import distill_steps, finetune_vpred, train_efficient
from jobs.cli.in_run import stage_job
from jobs.cli.job import Body, Job, Preview, run
from jobs.recipes.stages import starts_from
from jobs.runtime.exit_codes import exit_process
from jobs.training.sources import EFFICIENT_MODEL, VPRED_MODEL


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_plan`."""
    return run("distill_plan", distill_plan, preview=preview, about=__doc__, argv=argv)


def distill_plan(job: Job) -> None:
    """Make the initial models, then each stage's student, unless they are published already."""
    for name, make, _ in initial_models(job):
        print(f"[{name}]", flush=True)
        make(job)
    for stage in job.recipe.stages:
        print(f"[{stage.name}]", flush=True)
        distill_steps.distill(stage_job(job, stage))


def initial_models(job: Job) -> list[tuple[str, Body, Preview]]:
    """Jobs of the models that stages start from and no stage makes: the v model, and the efficient one."""
    stages, models = job.recipe.stages, list[tuple[str, Body, Preview]]()
    efficient = starts_from(stages, EFFICIENT_MODEL)
    if starts_from(stages, VPRED_MODEL) or (efficient and job.recipe.efficient.begin == VPRED_MODEL):
        models.append(("vpred", finetune_vpred.finetune, finetune_vpred.preview))
    if efficient:
        models.append(("efficient", train_efficient.train_efficient, train_efficient.preview))
    return models


def preview(job: Job) -> list[str]:
    """Describe what each stage would do."""
    lines = [line for _, _, preview in initial_models(job) for line in preview(job)]
    for stage in job.recipe.stages:
        steps = stage_job(job, stage).recipe.distill.steps
        mode = f"p = {steps.cfg_probability:g}{', w-conditioned' if steps.w_conditioned else ''}"
        lines += [f"{stage.name} ({mode}): {line}" for line in distill_steps.preview(stage_job(job, stage))]
    return lines or ["nothing: this recipe has no schedule"]


if __name__ == "__main__":
    exit_process(main())
