"""Forecast a run before it starts, and compare the forecast with the run afterwards.

Times follow from rates, which are given or measured here in a minute or two.

OUT/plan.json    the plan, for programs
OUT/rates.json   the measured rates, which the next plan in OUT uses again
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from jobs.cli.config_file import read_config
from jobs.cli.job import Job, prepare_stores
from jobs.cli.planned import PLAN
from jobs.cli.state import read_json
from jobs.cli.verb import DRY_RUN, RECIPE_OPTIONS, Options, Verb, open_job
from jobs.planning.settings import PlanSettings
from jobs.runtime.logs import logger
from pipelines.storage.objects import replace_object
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    from jobs.planning.rates_and_prices import Rates
    from snapfusion.models.network_sizes import NetworkSizes


_PREFIX = "plan."


def _plan(options: Options) -> None:
    from jobs.planning.actuals import compare
    from jobs.planning.format import assumptions, format_comparison, format_plan
    from jobs.planning.plan import counts_of, node_of, plan_run
    from jobs.planning.rates_and_prices import PriceList, Rates
    from jobs.planning.workload import Workload
    from snapfusion.models.network_sizes import network_sizes

    given = [*read_config(options.config), *options.set]
    own = [one.removeprefix(_PREFIX) for one in given if one.startswith(_PREFIX)]
    try:
        settings = PlanSettings().with_values(own)
    except SettingsError as error:
        raise SettingsError(f"--set {_PREFIX}{error}") from None
    job = open_job("plan", options, prefix=_PREFIX)
    prepare_stores(job)
    if options.dry_run:
        logger.info(settings.to_json())
        return
    if settings.rates is not None and settings.node is None:
        raise SettingsError(
            "--set plan.node: given rates belong to no machine here; name a node of the price list "
            f"{settings.prices}"
        )
    # Mistakes are refused before a minute is spent on a probe.
    counts, prices = counts_of(job, settings), PriceList.read(settings.prices)
    node = node_of(settings, prices=prices)
    sizes = network_sizes(job.recipe.model)
    rates = Rates.read(settings.rates) if settings.rates else _probed(job, sizes=sizes)
    workload = Workload(job=job, settings=settings, sizes=sizes, counts=counts, rates=rates)
    plan = plan_run(workload, prices=prices, node=node)
    logger.info("\n".join(format_plan(plan)))
    comparisons = compare(job, plan.stages)
    if any(one.measured is not None for one in comparisons):
        logger.info("\n".join(["", f"beside the run in {job.out}", "", *format_comparison(comparisons)]))
    values = {
        **plan.to_values(),
        "assumptions": assumptions(plan),
        "compared": [{**one._asdict(), "ratio": one.ratio} for one in comparisons],
    }
    replace_object(job.url(PLAN), f"{json.dumps(values, indent=1, allow_nan=False)}\n".encode())
    logger.info(f"\n{job.url('plan.json')}")


def _probed(job: Job, *, sizes: NetworkSizes) -> Rates:
    """The rates that an earlier probe measured in this run's folder, or those measured now."""
    from jobs.planning.probe import probe
    from jobs.planning.rates_and_prices import Rates

    url = job.url("rates.json")
    try:
        if (values := read_json(url)) is not None:
            return Rates.parse(values)
    except ValueError as error:
        raise SettingsError(f"--out {job.out}: rates.json holds no rates ({error}); remove it") from None
    rates = probe(job, sizes=sizes)
    replace_object(url, f"{rates.to_json()}\n".encode())
    return rates


main = Verb(
    "plan",
    click.Command("plan", params=[*RECIPE_OPTIONS, DRY_RUN], help=(__doc__ or "").split("\n\n")[0]),
    _plan,
)

if __name__ == "__main__":
    main.exit()
