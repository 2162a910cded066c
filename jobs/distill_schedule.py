"""Distil in stages, each student from those before it, by the recipe's schedule. SnapFusion Sec. 4.1."""

from jobs import distill_steps, finetune_vpred, train_efficient
from jobs.cli.in_run import stage_job
from jobs.cli.job import Job
from jobs.cli.verb import Body, Preview, recipe_verb
from jobs.recipes.verbs import initial_verbs
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_status


def distill_schedule(job: Job) -> None:
    """Train the models that the schedule starts from, then each stage's student; skip those that exist."""
    for verb in initial_verbs(job.recipe):
        name, body, _ = _INITIAL[verb]
        logger.info(f"[{name}]")
        show_status(name)
        body(job)
    for stage in job.recipe.stages:
        logger.info(f"[{stage.name}]")
        show_status(stage.name)
        distill_steps.distill(stage_job(job, stage))


_INITIAL: dict[str, tuple[str, Body, Preview]] = {
    "finetune_vpred": ("vpred", finetune_vpred.finetune, finetune_vpred.preview),
    "train_efficient": ("efficient", train_efficient.train_efficient, train_efficient.preview),
}


def preview(job: Job) -> list[str]:
    """Describe what each stage would do."""
    lines = [line for verb in initial_verbs(job.recipe) for line in _INITIAL[verb][2](job)]
    for stage in job.recipe.stages:
        student = stage_job(job, stage)
        steps = student.recipe.distill.targets_settings
        settings = f"p = {steps.cfg_probability:g}{', w-conditioned' if steps.w_conditioned else ''}"
        lines += [f"{stage.name} ({settings}): {line}" for line in distill_steps.preview(student)]
    return lines or ["nothing: this recipe has no schedule"]


main = recipe_verb("distill_schedule", distill_schedule, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
