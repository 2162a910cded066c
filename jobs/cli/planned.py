"""Reads what `jobs.plan` has forecast of a job, for its dry run."""

from typing import Any

from jobs.cli.job import Job
from jobs.cli.state import read_json
from jobs.recipes.verbs import initial_verbs, pipeline_verbs
from jobs.runtime.progress import format_duration

PLAN = "plan.json"
"""Name of the plan in a run's folder."""

_PIPELINE, _SCHEDULE = "run_pipeline", "distill_schedule"


def planned_lines(job: Job) -> list[str]:
    """Time and driver's memory of each stage of a job, by the plan of these settings in its run, if any."""
    plan = read_json(job.url(PLAN))
    if plan is None or plan["settings"] != job.recipe.digest():
        return []
    names = _stage_names(job)
    # A plan of an earlier version says nothing about the driver.
    return [
        _line(stage, url=job.url(PLAN))
        for stage in plan["stages"]
        if stage["name"] in names and "driver_bytes" in stage
    ]


def _stage_names(job: Job) -> set[str]:
    """Names of the stages that a job makes; students have their own."""
    recipe = job.recipe
    verbs = set(pipeline_verbs(recipe)) if job.verb == _PIPELINE else {job.verb}
    students = {recipe.distill.name} if "distill_steps" in verbs else set[str]()
    if _SCHEDULE in verbs:
        verbs |= set(initial_verbs(recipe))
        students |= {stage.name for stage in recipe.stages}
    return verbs | students


def _line(stage: dict[str, Any], *, url: str) -> str:
    seconds = stage["start_seconds"] + stage["work_seconds"] + stage["after_seconds"]
    whole, alone = format_duration(seconds), format_duration(stage["driver_seconds"])
    memory = f"{stage['driver_bytes'] / 2**30:.1f} GiB"
    return f"{stage['name']}: {whole} by {url}, {alone} of it by the driver alone, which takes {memory}"
