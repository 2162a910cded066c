"""Reads what a run's stages took: from its step records, tables of units and training metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.cli.job import Job
from jobs.cli.state import read_json, read_json_files
from jobs.planning.forecast import StageForecast
from jobs.training.metrics import METRICS
from pipelines.costs.stage import StageCost
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
    steps = recorded_steps(job)
    return [_compare(job, one, steps=steps) for one in forecasts]


def _compare(job: Job, one: StageForecast, *, steps: Mapping[str, float]) -> ForecastComparison:
    measured, what = _actual(job, one.stage, steps=steps)
    seconds = one.network_seconds if what == "work" else one.seconds
    return ForecastComparison(name=one.stage.name, forecast=seconds, measured=measured, what=what)


def _actual(job: Job, stage: StageCost, *, steps: Mapping[str, float]) -> tuple[float | None, str]:
    # A step record covers a stage only if the job made that stage alone.
    if stage.verb in steps and stage.name in (stage.verb, job.recipe.distill.name):
        return steps[stage.verb], "step"
    if stage.verb in (*_TRAININGS, "distill_steps"):
        metrics = read_json(job.url(f"{_TRAININGS.get(stage.verb, stage.name)}/{METRICS}")) or {}
        if (seconds := metrics.get("seconds")) is not None:
            return float(seconds), "training"
    if stage.verb in _TABLES and is_table(table := job.url(_TABLES[stage.verb])):
        records = open_table(table).unit_records()
        units = [record.seconds for record in records if record.seconds is not None]
        if records and len(units) == len(records):
            return sum(units), "work"
    return None, ""


def recorded_steps(job: Job) -> dict[str, float]:
    """The longest record of each step of `jobs.run_pipeline`; shorter ones found it done.

    Settings are not compared: those that change no row have another hash too.
    """
    records = sorted(read_json_files(job.url("steps")), key=lambda record: float(record["seconds"]))
    # The last record of a verb is the one that stays.
    return {record["verb"]: float(record["seconds"]) for record in records}
