"""Measure the latency of each part of the model's UNet, here or on a phone. SnapFusion Sec. 2.2, Fig. 2.

OUT/latency/RUNTIME-PRECISION-DEVICE.json   latency table, and its predictions for whole UNets (Table 1)
OUT/latency/...-ms.svg, -parameters.svg     Fig. 2
OUT/latency/programs/                       with --export: programs for another device, and its job list

Table 3's UNet, made of the model's own, is measured beside it. --import makes a table of the same form from
the times of another device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from jobs.cli.in_run import measure_in_run
from jobs.cli.inputs import latency_table_url
from jobs.cli.job import Job
from jobs.cli.state import state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import StatusLine
from snapfusion.settings import SettingsError

OPTIONS = [
    click.Option(["--export"], is_flag=True, help="write each part as .pte and .mlpackage for a device"),
    click.Option(["--whole"], is_flag=True, help="with --export: the whole UNets, too"),
    click.Option(["--import", "times"], metavar="FILE", help="times that a device returned, as a table"),
]


def measure(job: Job) -> None:
    """Measure the run's latency table, unless it exists already."""
    from jobs.evaluation.device_latency import timed_unets
    from jobs.evaluation.latency import measure_latency

    settings, line = job.recipe.latency, StatusLine()

    def measured() -> dict[str, Any]:
        unets = timed_unets(settings, source=job.recipe.model)
        return measure_latency(
            settings,
            architectures=unets.unets,
            tokens=unets.dimensions.tokens,
            on_turn=lambda turn: line.show(f"{turn} of {settings.turns} turns", last=turn == settings.turns),
        )

    _write(latency_table_url(job), measured)


def _export(job: Job) -> None:
    from jobs.evaluation.device_latency import export_programs, timed_unets

    line, url = StatusLine(), job.url("latency/programs")
    written = export_programs(
        timed_unets(job.recipe.latency, source=job.recipe.model),
        settings=job.recipe.latency,
        layout=job.recipe.mobile.attention,
        whole=bool(job.options["whole"]),
        url=url,
        on_program=lambda name: line.show(f"compiling {name}", last=False),
    )
    logger.info(f"  {url}{'' if written else ' exists already'}")


def _import(job: Job) -> None:
    from jobs.evaluation.device_latency import check_kept, file_name, import_times, read_times, timed_unets

    times = read_times(job.options["times"])
    expected = timed_unets(job.recipe.latency, source=job.recipe.model)
    record, name = import_times(times, expected=expected), f"latency/{file_name(times)}"
    check_kept(record, url=job.url(name))
    _write(job.url(name), lambda: record)
    logger.info(f"  evolve-unet takes it with --set evolution.table=run:{name}")


def _write(url: str, measure: Callable[[], Mapping[str, Any]]) -> None:
    """Write the record and its charts, unless the record exists already."""
    from jobs.evaluation.latency import latency_lines
    from jobs.reports.latency_breakdown import with_charts

    measure_in_run(url, lambda: with_charts(measure(), url=url), summary=latency_lines)


def _work(job: Job) -> None:
    exporting, times, whole = (job.options[name] for name in ("export", "times", "whole"))
    if times and (exporting or whole):
        raise SettingsError(f"--import {times}: it is accepted without --export and --whole")
    if whole and not exporting:
        raise SettingsError("--whole: it has an effect with --export only")
    (_export if exporting else _import if times else measure)(job)


def preview(job: Job) -> list[str]:
    """Describe what would be measured, written or read."""
    settings, url, model = job.recipe.latency, latency_table_url(job), job.recipe.model
    if times := job.options.get("times"):
        return [f"would make a latency table of {model}'s UNet from the times in {times}"]
    if job.options.get("export"):
        return [f"would compile each part of {model}'s UNet into {job.url('latency/programs')}"]
    return [
        f"would take {settings.turns} turns of each part of {model}'s UNet, by {settings.runtime} "
        f"in {settings.precision} on {settings.device}, into {url} ({state_of(url)})"
    ]


main = recipe_verb("measure_latency", _work, preview=preview, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
