"""What a run took, stage by stage: by its records of steps, its tables of units, its trainings' metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fsspec

from jobs.cli.job import Job
from jobs.planning.forecast import PlannedStage, StageForecast
from jobs.training.run_folder import METRICS
from pipelines.storage.objects import exists, read_bytes
from pipelines.tables.table import is_table, open_table

STEPS = "steps"
_TABLES = {"encode_latents": "latents", "compute_targets": "targets", "generate_pairs": "pairs"}
_TRAININGS = {
    "finetune_vpred": "vpred",
    "train_robust": "robust",
    "train_efficient": "efficient",
    "distill_decoder": "decoder",
}


@dataclass(frozen=True, kw_only=True)
class Actual:
    """What a stage took.

    Attributes:
        seconds: of it.
        what: which seconds they are: of the "step" from its first to its last, of the "training" likewise, or
            those that a table's network was at "work", to be held against the forecast's work alone.
    """

    seconds: float
    what: str


@dataclass(frozen=True, kw_only=True)
class ForecastComparison:
    """A stage's forecast beside what it took, in seconds; `actual_of` is None where nothing is recorded."""

    name: str
    forecast: float
    measured: float | None
    what: str

    @property
    def ratio(self) -> float | None:
        """Forecast over measured."""
        return self.forecast / self.measured if self.measured else None


def compare(job: Job, forecasts: Sequence[StageForecast]) -> list[ForecastComparison]:
    """Each stage's forecast beside what the run at `job.out` took."""
    steps = recorded_steps(job)
    return [_compared(one, actual_of(job, one.stage, steps=steps)) for one in forecasts]


def _compared(one: StageForecast, found: Actual | None) -> ForecastComparison:
    work_alone = found is not None and found.what == "work"
    return ForecastComparison(
        name=one.stage.name,
        forecast=one.network_seconds if work_alone else one.seconds,
        measured=None if found is None else found.seconds,
        what="" if found is None else found.what,
    )


def actual_of(job: Job, stage: PlannedStage, *, steps: Mapping[str, float]) -> Actual | None:
    """What a stage took; None if the run says nothing of it."""
    if stage.verb in steps and stage.name == stage.verb:
        return Actual(seconds=steps[stage.verb], what="step")
    if stage.verb == "distill_steps" and stage.name == job.recipe.distill.name and stage.verb in steps:
        return Actual(seconds=steps[stage.verb], what="step")
    place = job.url(_TRAININGS.get(stage.verb, stage.name))
    if stage.verb in (*_TRAININGS, "distill_steps") and exists(f"{place}/{METRICS}"):
        seconds = json.loads(read_bytes(f"{place}/{METRICS}")).get("seconds")
        return None if seconds is None else Actual(seconds=float(seconds), what="training")
    table = job.url(_TABLES.get(stage.verb, ""))
    if stage.verb in _TABLES and is_table(table):
        seconds = [record["seconds"] for record in open_table(table).unit_records()]
        if seconds and None not in seconds:
            return Actual(seconds=sum(seconds), what="work")
    return None


def recorded_steps(job: Job) -> dict[str, float]:
    """The longest record of each step of `jobs.run_pipeline`: the others found it done.

    Whatever settings they were made with: those that change no row have another hash too.
    """
    place = job.url(STEPS)
    if not exists(place):
        return {}
    filesystem, path = fsspec.core.url_to_fs(place)
    longest: dict[str, float] = {}
    for entry in filesystem.ls(path, detail=False):
        if entry.endswith(".json"):
            told = json.loads(filesystem.cat_file(entry))
            longest[told["verb"]] = max(longest.get(told["verb"], 0.0), float(told["seconds"]))
    return longest
