"""Reads what a run's stages took: from its step records, tables of units and training metrics."""

from collections.abc import Sequence
from typing import NamedTuple

from jobs.cli.job import Job
from jobs.cli.state import read_json
from jobs.cli.step_times import StepTime, read_steps
from jobs.planning.plan import StageForecast
from jobs.training.metrics import METRICS
from pipelines.costs.stage import StageCost
from pipelines.tables.table import is_table, open_table

_RESULTS = {
    "encode_latents": "latents",
    "compute_targets": "targets",
    "generate_pairs": "pairs",
    "finetune_vpred": "vpred",
    "train_robust": "robust",
    "train_efficient": "efficient",
    "distill_decoder": "decoder",
}
"""Where in a run a job's table or model lies; a student lies under its own name."""


class ForecastComparison(NamedTuple):
    """A stage's forecast and its measured time in seconds; None if the run has no record.

    `what` says which time both are: of the whole "step" or "training", or the network's "work" alone. The
    driver's figures are the seconds in which it worked alone, and its peak memory in MiB.
    """

    name: str
    forecast: float
    measured: float | None
    what: str
    driver_forecast: float = 0.0
    driver_measured: float | None = None
    driver_mib_forecast: float = 0.0
    driver_mib_measured: float | None = None

    @property
    def ratio(self) -> float | None:
        """Forecast divided by measured."""
        return self.forecast / self.measured if self.measured else None


def compare(job: Job, forecasts: Sequence[StageForecast]) -> list[ForecastComparison]:
    """Compare each stage's forecast with what the run at `job.out` took."""
    # The longest record of each step; shorter ones found it done. Settings are not compared: those that
    # change no row have another hash too.
    steps = {step.verb: step for step in sorted(read_steps(job), key=lambda step: step.seconds)}
    comparisons = []
    for one in forecasts:
        stage, step = one.stage, steps.get(one.stage.verb)
        # A step record covers a stage only if the job made that stage alone.
        if step is not None and stage.name in (stage.verb, job.recipe.distill.name):
            comparisons.append(_with_step(one, step))
            continue
        measured, what = _from_result(job, stage)
        forecast = one.network_seconds if what == "work" else one.seconds
        comparisons.append(ForecastComparison(stage.name, forecast, measured, what))
    return comparisons


def _with_step(one: StageForecast, step: StepTime) -> ForecastComparison:
    return ForecastComparison(
        name=one.stage.name,
        forecast=one.seconds,
        measured=step.seconds,
        what="step",
        driver_forecast=one.driver_seconds,
        # All of a local stage is the driver's, whether there are rows or not.
        driver_measured=step.seconds if one.stage.local else step.driver_seconds,
        driver_mib_forecast=one.driver_bytes / 2**20,
        driver_mib_measured=step.driver_peak_mib,
    )


def _from_result(job: Job, stage: StageCost) -> tuple[float | None, str]:
    """Seconds that a published training or a table's units record, and which time that is."""
    url = job.url(_RESULTS.get(stage.verb, stage.name))
    if stage.startup == "training":
        seconds = (read_json(f"{url}/{METRICS}") or {}).get("seconds")
        return (None, "") if seconds is None else (float(seconds), "training")
    records = open_table(url).unit_records() if stage.writes and is_table(url) else []
    units = [record.seconds for record in records if record.seconds is not None]
    return (sum(units), "work") if units and len(units) == len(records) else (None, "")
