"""Trainings that read their parents from the run and publish into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from jobs.cli.inputs import latents_sources
from jobs.cli.job import Job
from jobs.cli.licences import licence_of
from jobs.cli.resources import connect_for, section_of
from jobs.cli.state import state_of
from jobs.recipes.recipe import Recipe
from jobs.recipes.stages import DistillationStage
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress
from jobs.training.metrics import METRICS
from jobs.training.settings import UNetTrainingSettings
from pipelines.storage.objects import exists, replace_object
from snapfusion.models.source import absolute_source
from snapfusion.settings import SettingsError
from snapfusion.training.settings import LoopSettings

if TYPE_CHECKING:
    from jobs.evaluation.curve_tables import StartTable
    from pipelines.tables.commits import Origin
    from pipelines.tables.committer import OnProgress
    from snapfusion.models.card import PublishedModel


FOLLOW: Final = click.Option(
    ["--follow"],
    is_flag=True,
    help="train while LATENTS are written: epoch 0 reads units in their planned order",
)


def stage_job(job: Job, stage: DistillationStage) -> Job:
    """The job that makes a stage's student: the recipe's `distill`, changed as the stage says.

    Raises:
        SettingsError: if the recipe's settings do not go with the stage's.
    """
    distill = job.recipe.distill
    dmd2 = distill.dmd2 or stage.dmd2
    consistency = None if dmd2 else distill.consistency
    own = {"student_steps", "k", "cfg_probability", "w_conditioned"}
    steps = stage.model_dump(mode="json", include=own, exclude_none=True)
    try:
        changes = {
            "name": stage.name,
            "teacher": stage.teacher,
            "student": stage.student,
            "table": stage.table or distill.table,
            "steps": distill.steps.to_values() | steps,
            "consistency": consistency and consistency.with_steps(stage.student_steps).to_values(),
            "dmd2": dmd2 and dmd2.with_steps(stage.student_steps).to_values(),
            "loop": (stage.loop or distill.loop).to_values(),
        }
        recipe = Recipe.parse(job.recipe.to_values() | {"distill": distill.to_values() | changes})
    except SettingsError as error:
        raise SettingsError(f"stage {stage.name}: {error}") from None
    return replace(job, verb="distill_steps", recipe=recipe)


SettingsT = TypeVar("SettingsT", bound=UNetTrainingSettings)


def train_in_run(
    job: Job, section: str, *, model: str, url: str, begin: str | None = None, further: bool = False
) -> None:
    """Train by a section of the recipe on the LATENTS of the run by L_ori, and print the held-out loss.

    Args:
        job: whose recipe it is.
        section: of the recipe.
        model: that is trained.
        url: of the training.
        begin: the model of which `model` was made, if it is another one.
        further: also accept a model that predicts v already.
    """
    from jobs.training.velocity import finetune_vpred

    settings = resolve_training(section_of(job, section), job)
    if job.options.get("follow"):
        settings = settings.model_copy(update={"follow": True})
    connect_unless_published(job, section, url)
    metrics = finetune_vpred(
        settings,
        model=model,
        latents_url=job.url("latents"),
        out_url=url,
        further=further,
        base=base_model_of(job, begin or model),
        table_sources=partial(latents_sources, job),
    )
    evaluation = metrics["evaluation"]
    logger.info(f"  {url}/model: L_ori {evaluation['loss']:.5f} on {evaluation['rows']} held-out rows")


def base_model_of(job: Job, *sources: str) -> PublishedModel:
    """The model that the run begins with, and the licence of what is trained from `sources`."""
    from snapfusion.models.card import PublishedModel

    licence = licence_of(job, *sources)
    return PublishedModel(model=absolute_source(job.recipe.model), licence=licence.weights)


def connect_unless_published(job: Job, section: str, url: str) -> None:
    """Connect to Ray for a section of the recipe, if there is something to train."""
    if not exists(f"{url}/{METRICS}"):
        connect_for(job, section)


def describe_training(table_url: str, loop: LoopSettings, *, url: str, follow: bool = False) -> str:
    """The part of a preview that is common to all trainings; `follow` is of the option."""
    state, growing = state_of(url, last=METRICS), ", while it is written," if follow else ""
    rows = f"{loop.num_steps} steps of {loop.global_batch} rows"
    return f"on {table_url}{growing} for {rows}, into {url} ({state})"


def resolve_training(settings: SettingsT, job: Job) -> SettingsT:
    """Settings whose validation references are a URL and not a path in the run."""
    references = settings.validation.references and job.resolve(settings.validation.references)
    validation = settings.validation.model_copy(update={"references": references})
    return settings.model_copy(update={"validation": validation})


def table_starter(job: Job, *, prefix: str = "") -> StartTable:
    """A callback that gives a table its origin and a status line, named after the table."""

    def start(name: str, parents: Any) -> tuple[Origin, OnProgress]:  # noqa: ANN401 - JSON values
        return job.origin(parents), show_progress(f"{prefix}{name}")

    return start


def measure_in_run(
    url: str, measure: Callable[[], Mapping[str, Any]], *, summary: Callable[[Any], Iterable[str]]
) -> None:
    """Measure, write the record as JSON and print its summary, unless the file exists already."""
    if exists(url):
        logger.info(f"  {url} exists already")
        return
    record = measure()
    replace_object(url, json.dumps(record, indent=1).encode())
    for line in (*summary(record), url):
        logger.info(f"  {line}")
