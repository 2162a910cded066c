"""Forecast a run before it starts, and compare the forecast with the run afterwards.

Times follow from rates, which are given or measured here in a minute or two.

OUT/plan.json    the plan, for programs
OUT/rates.json   the measured rates, which the next plan in OUT uses again
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from jobs.cli.job import Job, prepare_stores, recipe_parser, resolve_recipe
from jobs.cli.state import read_json
from jobs.planning.actuals import compare
from jobs.planning.format import assumptions, format_comparison, format_plan
from jobs.planning.plan import counts_of, node_of, plan_run
from jobs.planning.prices import PriceList
from jobs.planning.probe import probe
from jobs.planning.rates import Rates
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Workload
from jobs.runtime.exit_codes import exit_process, run_guarded
from pipelines.storage.objects import replace_object
from snapfusion.models.network_sizes import NetworkSizes, network_sizes
from snapfusion.settings import SettingsError

_PREFIX = "plan."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.plan`."""
    parser = recipe_parser(
        "plan",
        about=__doc__,
        set_help="change a setting of the recipe or, as in plan.rows=1000000, of the planner",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the planner's settings, and neither probe nor plan"
    )
    return run_guarded("plan", lambda: _plan(parser.options(argv)))


def _plan(options: argparse.Namespace) -> None:
    own = [one.removeprefix(_PREFIX) for one in options.set if one.startswith(_PREFIX)]
    try:
        settings = PlanSettings().with_values(own)
    except SettingsError as error:
        raise SettingsError(f"--set {_PREFIX}{error}") from None
    recipe = resolve_recipe(options.recipe, [one for one in options.set if not one.startswith(_PREFIX)])
    job = Job(verb="plan", recipe=recipe, out=options.out.rstrip("/"))
    prepare_stores(job)
    if options.dry_run:
        print(settings.to_json())
        return
    if settings.rates is not None and settings.node is None:
        raise SettingsError(
            "--set plan.node: given rates belong to no machine here; name a node of the price list "
            f"{settings.prices}"
        )
    # Mistakes are refused before a minute is spent on a probe.
    counts, prices = counts_of(job, settings), PriceList.read(settings.prices)
    node = node_of(settings, prices=prices)
    sizes = network_sizes(recipe.model)
    rates = Rates.read(settings.rates) if settings.rates else _probed(job, sizes=sizes)
    workload = Workload(job=job, settings=settings, sizes=sizes, counts=counts, rates=rates)
    plan = plan_run(workload, prices=prices, node=node)
    print("\n".join(format_plan(plan)))
    comparisons = compare(job, plan.stages)
    if any(one.measured is not None for one in comparisons):
        print("\n".join(["", f"beside the run in {job.out}", "", *format_comparison(comparisons)]))
    values = {
        **plan.to_values(),
        "assumptions": assumptions(plan),
        "compared": [{**asdict(one), "ratio": one.ratio} for one in comparisons],
    }
    replace_object(job.url("plan.json"), f"{json.dumps(values, indent=1, allow_nan=False)}\n".encode())
    print(f"\n{job.url('plan.json')}")


def _probed(job: Job, *, sizes: NetworkSizes) -> Rates:
    """The rates that an earlier probe measured in this run's folder, or those measured now."""
    url = job.url("rates.json")
    try:
        if (values := read_json(url)) is not None:
            return Rates.parse(values)
    except ValueError as error:
        raise SettingsError(f"--out {job.out}: rates.json holds no rates ({error}); remove it") from None
    rates = probe(job, sizes=sizes)
    replace_object(url, f"{rates.to_json()}\n".encode())
    return rates


if __name__ == "__main__":
    exit_process(main())
