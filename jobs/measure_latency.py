"""Measure the latency of each part of the model's UNet on this machine. SnapFusion Sec. 2.2, Table 1, Fig. 2.

OUT/latency/RUNTIME-PRECISION-DEVICE.json   latency table, and its predictions for whole UNets
OUT/latency/...-ms.svg, -parameters.svg     Fig. 2

Table 3's UNet, made of the model's own, is measured beside it. A table that was measured elsewhere, as on a
phone, has the same form.
"""

from typing import Any

from jobs.cli.in_run import measure_in_run
from jobs.cli.inputs import latency_table_url
from jobs.cli.job import Job
from jobs.cli.state import state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.progress import StatusLine
from pipelines.storage.objects import replace_object


def measure(job: Job) -> None:
    """Measure the run's latency table, unless it exists already."""
    from jobs.evaluation.latency import latency_lines

    measure_in_run(latency_table_url(job), lambda: _measure(job), summary=latency_lines)


def _measure(job: Job) -> dict[str, Any]:
    from jobs.evaluation.latency import measure_latency
    from jobs.evaluation.timing import architectures_of, load_measured_model
    from jobs.reports.charts import standalone_svg
    from jobs.reports.latency_breakdown import breakdown_charts

    settings, line = job.recipe.latency, StatusLine()
    model = load_measured_model(job.recipe.model, settings=settings)
    record = measure_latency(
        settings,
        architectures=architectures_of(model.architecture),
        tokens=model.tokens,
        on_turn=lambda turn: line.show(f"{turn} of {settings.turns} turns", last=turn == settings.turns),
    )
    for kind, chart in breakdown_charts(record).items():
        replace_object(job.url(f"latency/{settings.name}-{kind}.svg"), standalone_svg(chart))
    return record


def preview(job: Job) -> list[str]:
    """Describe what would be measured."""
    settings, url = job.recipe.latency, latency_table_url(job)
    return [
        f"would take {settings.turns} turns of each part of {job.recipe.model}'s UNet, by {settings.runtime} "
        f"in {settings.precision} on {settings.device}, into {url} ({state_of(url)})"
    ]


main = recipe_verb("measure_latency", measure, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
