"""Trainings that read their parents from the run and publish into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from jobs.cli.job import Job
from jobs.recipes.stages import DistillationStage
from jobs.training.progress_channel import show_reports
from jobs.training.run_folder import METRICS
from jobs.training.settings import ValidationSettings, VpredSettings
from jobs.training.velocity import finetune_vpred
from pipelines.storage.objects import exists
from snapfusion.training.settings import StepDistillationSettings


def stage_job(job: Job, stage: DistillationStage) -> Job:
    """The job that makes a stage's student: the recipe's `distill`, with what the stage says of it."""
    distill = job.recipe.distill
    told = {
        "name": stage.name,
        "teacher": stage.teacher,
        "student": stage.student,
        "table": stage.table or distill.table,
        "steps": _stage_steps(distill.steps, stage=stage),
    }
    recipe = job.recipe.model_copy(update={"distill": distill.model_copy(update=told)})
    return replace(job, verb="distill_steps", recipe=recipe)


def _stage_steps(steps: StepDistillationSettings, *, stage: DistillationStage) -> StepDistillationSettings:
    """What a stage's student learns.

    Raises:
        SettingsError: if the recipe's settings do not go with the stage's.
    """
    said = {"cfg_probability": stage.cfg_probability, "w_conditioned": stage.w_conditioned}
    told = {name: value for name, value in said.items() if value is not None}
    return StepDistillationSettings.parse(
        {**steps.to_values(), "student_steps": stage.student_steps, "k": stage.k, **told}
    )


VpredSettingsT = TypeVar("VpredSettingsT", bound=VpredSettings)


def train_in_run(
    job: Job, settings: VpredSettings, *, model: str, place: str, further: bool = False
) -> dict[str, Any]:
    """`finetune_vpred` on the LATENTS of the job's run; Ray is there only if there is something to train."""
    from jobs.runtime.cluster import connect

    if not exists(f"{place}/{METRICS}"):
        connect(job.recipe.cluster)
    return finetune_vpred(
        resolve_training(settings, job),
        model=model,
        latents_url=job.url("latents"),
        out_url=place,
        further=further,
        on_report=show_reports(),
    )


def resolve_training(settings: VpredSettingsT, job: Job) -> VpredSettingsT:
    """The settings with what the watch reads where it lies in the job's run."""
    return settings.model_copy(update={"watch": resolve_validation(settings.watch, job)})


def resolve_validation(settings: ValidationSettings, job: Job) -> ValidationSettings:
    """The settings with references that lie in the job's run where they are."""
    references = settings.references and job.resolve(settings.references)
    return settings.model_copy(update={"references": references})
