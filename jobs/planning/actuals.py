"""Reads what a run's stages took: from its step records, tables of units and training metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fsspec

from jobs.cli.job import Job
from jobs.planning.forecast import StageForecast
from jobs.training.run_folder import METRICS
from pipelines.costs.stage import StageCost
from pipelines.storage.objects import exists, read_bytes
from pipelines.tables.table import is_table, open_table

_TABLES = {"encode_latents": "latents", "compute_targets": "targets", "generate_pairs": "pairs"}
_TRAININGS = {
    "finetune_vpred": "vpred",
    "train_robust": "robust",
    "train_efficient": "efficient",
    "distill_decoder": "decoder",
}


@dataclass(frozen=True, kw_only=True)
class ForecastComparison:
    """A stage's forecast and its measured time.

    Attributes:
        name: of the stage.
        forecast: in seconds.
        measured: in seconds; None if the run has no record.
        what: which time both are: of the whole "step" or "training", or the network's "work" alone.
    """

    name: str
    forecast: float
    measured: float | None
    what: str

    @property
    def ratio(self) -> float | None:
        """Forecast divided by measured."""
        return self.forecast / self.measured if self.measured else None


def compare(job: Job, forecasts: Sequence[StageForecast]) -> list[ForecastComparison]:
    """Compare each stage's forecast with what the run at `job.out` took."""
    steps, comparisons = recorded_steps(job), list[ForecastComparison]()
    for one in forecasts:
        measured, what = _actual(job, one.stage, steps=steps)
        seconds = one.network_seconds if what == "work" else one.seconds
        comparisons.append(
            ForecastComparison(name=one.stage.name, forecast=seconds, measured=measured, what=what)
        )
    return comparisons


def _actual(job: Job, stage: StageCost, *, steps: Mapping[str, float]) -> tuple[float | None, str]:
    # A step record covers a stage only if the job made that stage alone.
    alone = stage.name in (stage.verb, job.recipe.distill.name)
    if stage.verb in steps and alone:
        return steps[stage.verb], "step"
    if stage.verb in (*_TRAININGS, "distill_steps"):
        metrics = job.url(f"{_TRAININGS.get(stage.verb, stage.name)}/{METRICS}")
        if exists(metrics) and (seconds := json.loads(read_bytes(metrics)).get("seconds")) is not None:
            return float(seconds), "training"
    if stage.verb in _TABLES and is_table(table := job.url(_TABLES[stage.verb])):
        units = [record["seconds"] for record in open_table(table).unit_records()]
        if units and None not in units:
            return sum(units), "work"
    return None, ""


def recorded_steps(job: Job) -> dict[str, float]:
    """The longest record of each step of `jobs.run_pipeline`; shorter ones found it done.

    Settings are not compared: those that change no row have another hash too.
    """
    url = job.url("steps")
    if not exists(url):
        return {}
    filesystem, folder = fsspec.core.url_to_fs(url)
    longest: dict[str, float] = {}
    for path in filesystem.ls(folder, detail=False):
        if path.endswith(".json"):
            record = json.loads(filesystem.cat_file(path))
            longest[record["verb"]] = max(longest.get(record["verb"], 0.0), float(record["seconds"]))
    return longest
