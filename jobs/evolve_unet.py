"""Evolve the UNet's architecture to a latency objective. SnapFusion Sec. 3.1, Alg. 1.

OUT/evolution/   files of `jobs.evolution.search`, and page.html with its charts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs import measure_latency
from jobs.cli.caption_list import preview_list
from jobs.cli.in_run import resolve_training, table_starter
from jobs.cli.inputs import latency_table_url
from jobs.cli.job import Job
from jobs.cli.resources import connect_for, runner
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from pipelines.storage.objects import exists, replace_object
from pipelines.storage.records import read_record
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    from snapfusion.evolution.latency import LatencyTable


_NUM_SHOWN_CAPTIONS = 10
"""Captions on the page."""


def evolve_unet(job: Job) -> None:
    """Evolve the architecture; what is scored, decided and trained already is not done again."""
    from jobs.evolution.search import HISTORY, Evolution, round_images
    from jobs.reports.charts import standalone_svg
    from jobs.reports.evolution_page import evolution_charts, render_evolution

    settings = job.recipe.evolution
    if settings.latency_ms is None:
        raise SettingsError(
            "--set evolution.latency_ms: it is null; give the milliseconds that a guided step may take"
        )
    table = latency_table(job)

    if not exists(job.url(f"evolution/{HISTORY}")):
        connect_for(job, "evolution")
    history = Evolution(
        settings=settings.model_copy(update={"training": resolve_training(settings.training, job)}),
        objective_ms=settings.latency_ms,
        model=job.resolve(settings.begin),
        latents_url=job.url("latents"),
        table=table,
        out=job.url("evolution"),
        start=table_starter(job),
        run=runner(job, "evolution"),
    ).evolve()
    captions, images = round_images(settings, history, out=job.url("evolution"), limit=_NUM_SHOWN_CAPTIONS)
    page = render_evolution(history, captions=captions, images=images)
    replace_object(job.url("evolution/page.html"), page.encode())
    for number, chart in enumerate(evolution_charts(history), start=1):
        replace_object(job.url(f"evolution/chart-{number}.svg"), standalone_svg(chart))
    logger.info(f"  {job.url('evolution/architecture.json')}, shown in {job.url('evolution/page.html')}")


def latency_table(job: Job) -> LatencyTable:
    """The latency table of the settings, or this machine's, which is measured if the run has none.

    Raises:
        LatencyError: if it is malformed, or of another device or precision than the settings require.
    """
    from jobs.evaluation.timing import setting_of
    from snapfusion.evolution.latency import LatencyError, LatencyTable

    settings = job.recipe.evolution
    if settings.table is None:
        measure_latency.measure(job)
    url = job.resolve(settings.table) if settings.table else latency_table_url(job)
    try:
        record = read_record(url)
        table = LatencyTable.parse(record.get("table", record))
    except ValueError as error:
        raise LatencyError(f"{url} is no latency table: {error}") from None
    if settings.table is None:
        table.check_setup(setting_of(job.recipe.latency))
    for name, required in (("device", settings.device), ("precision", settings.precision)):
        found = getattr(table.setup, name)
        if required not in (None, found):
            raise LatencyError(
                f"the latency table {url} is of {name} {found!r}, and evolution.{name} is {required!r}: "
                "give another table"
            )
    return table


def preview(job: Job) -> list[str]:
    """Describe the evolution, and the cost of an action beside the paper's."""
    from jobs.evolution.search import describe_cost

    settings = job.recipe.evolution
    objective = "an unset latency" if settings.latency_ms is None else f"{settings.latency_ms:g} ms"
    prompts, rows = settings.prompts, job.recipe.source.sample_rows
    steps = prompts.num_images * settings.sampler.steps
    return [
        *preview_list(prompts.url, prompts.reading, rows=min(rows, prompts.limit)),
        f"would evolve {job.resolve(settings.begin)} to {objective} in at most {settings.rounds} rounds, "
        f"into {job.url('evolution')}",
        describe_cost(settings),
        f"after each change: {settings.training.loop.num_steps} steps of robust training of "
        f"{settings.training.loop.global_batch} rows; {steps:,} guided steps per action",
    ]


main = recipe_verb("evolve_unet", evolve_unet, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
