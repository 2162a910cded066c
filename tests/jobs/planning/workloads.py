"""Workloads of the planner, for tests."""

from jobs.cli.job import Job
from jobs.planning.rates_and_prices import Rates
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Counts, Workload
from jobs.recipes.registry import recipe_named
from snapfusion.models.network_sizes import network_sizes


def workload(
    recipe: str = "sd15", *, rows: int = 1_000, captions: int = 10, settings=(), plan=()
) -> Workload:
    job = Job(verb="plan", recipe=recipe_named(recipe).with_values(settings), out="nowhere")
    return Workload(
        job=job,
        settings=PlanSettings().with_values(plan),
        sizes=network_sizes(job.recipe.model),
        counts=Counts(source=rows, latents=rows, captions=captions),
        rates=Rates(name="r", about="", worker="one", date="2020-01-01", rates={}, png_share=0.5),
    )
