"""Evolve the UNet until a pass takes no more than was asked for. SnapFusion Sec. 3.1, Alg. 1.

OUT/evolution/   as `jobs.evolution.search` says; page.html to look at, and its charts
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs import measure_latency
from jobs.cli.in_run import resolve_training
from jobs.cli.inputs import latency_table_url
from jobs.cli.job import Job, run
from jobs.evaluation.timing import setting_of
from jobs.evolution.search import ACTION_HOURS, HISTORY, Evolution, EvolutionRound
from jobs.evolution.settings import EvolutionSettings
from jobs.reports.charts import standalone_svg
from jobs.reports.evolution_page import evolution_charts, render_evolution
from jobs.runtime.cluster import connect, runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import format_duration, show_progress
from jobs.training.progress_channel import show_reports
from pipelines.datasets.samples import source_name
from pipelines.storage.objects import exists, read_bytes, replace_object
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress
from pipelines.tables.schemas import from_png
from pipelines.tables.table import open_table
from snapfusion.evolution.latency import LatencyError, LatencyTable
from snapfusion.settings import SettingsError

_NUM_SHOWN_CAPTIONS = 10
"""Captions on the page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.evolve_unet`."""
    return run("evolve_unet", evolve_unet, preview=preview, about=__doc__, argv=argv)


def evolve_unet(job: Job) -> None:
    """Evolve; what is scored, decided and trained already is not done again."""
    settings = job.recipe.evolution
    if settings.latency_ms is None:
        raise SettingsError("--set evolution.latency_ms: it is null; say how long a guided step may take")
    table = latency_table(job)

    def start(name: str, parents: Any) -> tuple[Origin, OnProgress]:  # noqa: ANN401 - JSON values
        return job.origin(parents), show_progress(name)

    if not exists(job.url(f"evolution/{HISTORY}")):
        connect(job.recipe.cluster)
    training = resolve_training(settings.training, job)
    history = Evolution(
        settings=settings.model_copy(update={"training": training}),
        objective_ms=settings.latency_ms,
        model=job.resolve(settings.begin),
        latents_url=job.url("latents"),
        table=table,
        out=job.url("evolution"),
        start=start,
        run=runner(job.recipe.cluster),
        on_report=show_reports(),
        on_round=lambda over: print(f"  {describe_round(over)}", flush=True),
    ).evolve()
    captions, pictures = round_images(job, history)
    page = render_evolution(history, captions=captions, pictures=pictures)
    replace_object(job.url("evolution/page.html"), page.encode())
    for number, chart in enumerate(evolution_charts(history), start=1):
        replace_object(job.url(f"evolution/chart-{number}.svg"), standalone_svg(chart))
    print(f"  {job.url('evolution/architecture.json')}, shown in {job.url('evolution/page.html')}")


def latency_table(job: Job) -> LatencyTable:
    """The table that settings name, or this machine's, which is measured if the run has none.

    Raises:
        LatencyError: if it is of another device or precision than is wanted, or no latency table.
    """
    settings = job.recipe.evolution
    if settings.table is None:
        measure_latency.measure(job)
    place = job.resolve(settings.table) if settings.table else latency_table_url(job)
    try:
        told = json.loads(read_bytes(place))
        table = LatencyTable.parse(told.get("table", told))
    except (ValueError, AttributeError) as error:
        raise LatencyError(f"{place} is no latency table: {error}") from None
    if settings.table is None:
        table.check_setup(setting_of(job.recipe.latency))
    for name, wanted in (("device", settings.device), ("precision", settings.precision)):
        found = getattr(table.setup, name)
        if wanted not in (None, found):
            raise LatencyError(
                f"the latency table {place} is of {name} {found!r}, and evolution.{name} asks for "
                f"{wanted!r}; take another"
            )
    return table


def round_images(job: Job, history: Mapping[str, Any]) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """The first captions, and what the whole UNet of each scored round drew of them, if that was kept."""
    settings = job.recipe.evolution
    captions, pictures = list[str](), dict[str, list[np.ndarray]]()
    if not settings.samples.drawing.images:
        return captions, pictures
    for told in history["rounds"]:
        if told["clip"] is not None:
            table = open_table(job.url(f"evolution/round-{told['number']:02d}/scores"))
            prefix = f"{source_name(settings.prompts.name, settings.guidance)}-"
            unit = next(file for file in table.units if file.unit.startswith(prefix))
            rows = table.read_unit(unit, ["caption", "image"]).slice(0, _NUM_SHOWN_CAPTIONS).to_pylist()
            captions = [row["caption"] for row in rows]
            pictures[f"round {told['number']}"] = [from_png(row["image"]) for row in rows]
    return captions, pictures


def describe_round(over: EvolutionRound) -> str:
    """What a round did."""
    decision = over.decision
    if decision.action == "stop":
        return f"round {over.number}: {decision.after_ms:.4g} ms, and nothing more to do"
    clip = "" if over.clip is None else f"CLIP {over.clip[0]:.4f}; "
    verb = {"remove": "removed", "copy": "copied"}[decision.action]
    return (
        f"round {over.number}: {clip}{verb} {', '.join(decision.blocks)}: {decision.before_ms:.4g} to "
        f"{decision.after_ms:.4g} ms"
    )


def preview(job: Job) -> list[str]:
    """What a round would draw, and what the paper took for as much."""
    settings = job.recipe.evolution
    wanted = "an unset latency" if settings.latency_ms is None else f"{settings.latency_ms:g} ms"
    steps = settings.prompts.limit * settings.sampler.steps
    return [
        f"would evolve {job.resolve(settings.begin)} to {wanted} in at most {settings.rounds} rounds, into "
        f"{job.url('evolution')}",
        describe_cost(settings),
        f"after each change: {settings.training.loop.num_steps} steps of robust training of "
        f"{settings.training.loop.global_batch} rows; {steps:,} guided steps an action",
    ]


def describe_cost(settings: EvolutionSettings) -> str:
    """What scoring an action takes, beside the paper's 2.5 hours."""
    captions, steps = settings.prompts.limit, settings.sampler.steps
    paper_ms = 3.6e6 * ACTION_HOURS / (2_000 * 50)
    hours = captions * steps * paper_ms / 3.6e6
    return (
        f"each action: {captions:,} captions of {steps} steps at guidance {settings.guidance:g}; the paper's "
        f"2,000 captions of 50 steps took {ACTION_HOURS} A100 hours, {paper_ms:.0f} ms a guided step of "
        f"SD-v1.5, and so many at that pace take {format_duration(3600 * hours)}"
    )


if __name__ == "__main__":
    exit_process(main())
