"""Distil a student that takes fewer steps than its teacher. SnapFusion Sec. 4.2, Eq. 7-11.

Targets come from the teacher in the trainer (on LATENTS), or from the table TARGETS. With
`distill.consistency` the student is distilled by LCM or PCM instead, with `distill.dmd2` by DMD2.
"""

from jobs.cli.in_run import base_model_of, connect_unless_published, describe_training, resolve_training
from jobs.cli.inputs import check_distillation_table, distillation_table_url, teacher_and_student
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger


def distill(job: Job) -> None:
    """Make the run's student, unless it is published already."""
    from jobs.training.distillation import distill_steps, summary

    settings = job.recipe.distill
    url = job.url(settings.name)
    check_distillation_table(job)
    connect_unless_published(job, "distill", url)
    teacher, student = teacher_and_student(job)
    metrics = distill_steps(
        resolve_training(settings, job),
        teacher=teacher,
        student=student,
        data_url=distillation_table_url(job),
        out_url=url,
        base=base_model_of(job, teacher, student),
    )
    for line in summary(metrics):
        logger.info(f"  {line}")


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    settings, steps = job.recipe.distill, job.recipe.distill.steps
    check_distillation_table(job)
    teacher, student = teacher_and_student(job)
    training = describe_training(distillation_table_url(job), settings.loop, url=job.url(settings.name))
    if settings.dmd2 is not None:
        return [f"would distil {teacher} into {settings.dmd2.steps} steps of {student} by dmd2 {training}"]
    if settings.consistency is not None:
        method, points = settings.consistency.method, settings.consistency.points
        return [f"would distil {teacher} on {points} points into {student} by {method} {training}"]
    return [
        f"would distil {steps.k * steps.student_steps} steps of {teacher} into {steps.student_steps} of "
        f"{student} {training}"
    ]


main = recipe_verb("distill_steps", distill, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
