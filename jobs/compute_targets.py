"""Compute the targets of step distillation with the teacher into the table TARGETS. SnapFusion Sec. 4.2.

Reads LATENTS of the same run. The teacher is that of `distill_steps`, which reads this table, or else
computes the targets while it trains.
"""

from jobs.cli.inputs import teacher_and_student
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.state import log_table, state_of
from jobs.cli.verb import recipe_verb
from jobs.recipes.recipe import Recipe
from jobs.runtime.progress import show_progress
from pipelines.datasets.settings import differing_targets
from snapfusion.settings import SettingsError


def compute(job: Job) -> None:
    """Bring TARGETS up to date with the recipe; committed units are not made again."""
    from pipelines.datasets.targets import compute_targets
    from pipelines.loading.branches import count_branch_rows
    from pipelines.tables.table import open_table
    from snapfusion.models.source import absolute_source

    recipe = job.recipe
    teacher, _ = teacher_and_student(job)
    latents = open_table(job.url("latents"), kind="latents")
    progress = show_progress(job.verb)
    table = compute_targets(
        recipe.targets,
        teacher=absolute_source(teacher),
        latents=latents,
        url=job.url("targets"),
        origin=job.origin({"latents": latents.lineage(), "model": teacher}),
        run=runner(job, "targets", new_table=job.url("targets")),
        on_progress=progress,
    )
    guided = count_branch_rows(table, guided=True)
    log_table("TARGETS", table, note=f" ({guided} guided)", network_busy=progress.network_busy)


def preview(job: Job) -> list[str]:
    """Describe the inputs and the output."""
    url, targets = job.url("targets"), job.recipe.targets
    teaching, w = targets.teaching, targets.teaching.cfg_range
    teacher, _ = teacher_and_student(job)
    steps = f"{teaching.k * teaching.student_steps} steps of {teacher} for {teaching.student_steps}"
    return [
        f"would compute {targets.draws} targets for each latent of {job.url('latents')}, of {steps}, "
        f"{targets.cfg_probability:.0%} of them guided at {w.low} to {w.high}, into {url} ({state_of(url)})"
    ]


def check_use(recipe: Recipe) -> None:
    """Refuse targets that the recipe's own distillation would refuse.

    Raises:
        SettingsError: naming what differs.
    """
    distill, targets = recipe.distill, recipe.targets
    p = distill.targets_settings.cfg_probability
    differing = differing_targets(targets.teaching.to_values(), distill.targets_settings)
    if targets.cfg_probability in (0.0, 1.0) and p != targets.cfg_probability:
        differing.append(f"cfg_probability is {targets.cfg_probability:g} there, {p:g} here")
    if differing:
        raise SettingsError(
            f"targets would not fit the training of {distill.name}: {'; '.join(differing[:3])} (there: "
            "`targets`, here: `distill`); set the same for both"
        )


main = recipe_verb("compute_targets", compute, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
