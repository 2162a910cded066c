"""Say what a run will take, before it is begun; and afterwards, how that compares with what it took.

Rows, bytes, worker-hours, wall time by nodes, cost by a price list, peak memory, storage requests; and when
the teacher's targets pay beforehand. Times follow from rates, which a probe measures here in a minute or two,
or which are given.

OUT/plan.json    all of it, for programs
OUT/rates.json   what a probe measured; it is taken again by the next plan in OUT
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from jobs.cli.job import Job, prepare_stores
from jobs.planning.actuals import compare
from jobs.planning.format import assumptions, comparison, format_plan
from jobs.planning.plan import counts_of, node_of, plan_run, to_values
from jobs.planning.prices import price_list
from jobs.planning.probe import probe
from jobs.planning.rates import Rates, given_rates
from jobs.planning.settings import PlanSettings
from jobs.planning.sizes import ModelSizes, model_sizes
from jobs.planning.workload import Workload
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import exit_process, run_guarded
from jobs.runtime.secrets import without_secret
from pipelines.storage.objects import exists, read_bytes, replace_object
from snapfusion.settings import SettingsError

_MINE = "plan."


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.plan`."""
    return run_guarded("plan", lambda: _plan(_options(argv)))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m jobs.plan", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="mini", help=f"one of {', '.join(RECIPES)} (default: mini)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the recipe or, as in plan.rows=1000000, of the plan",
    )
    parser.add_argument("--out", default="runs/demo", help="folder or URL of the run (default: runs/demo)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the settings, and neither probe nor plan"
    )
    return parser.options(argv)


def _plan(options: argparse.Namespace) -> None:
    mine = [one.removeprefix(_MINE) for one in options.set if one.startswith(_MINE)]
    others = [one for one in options.set if not one.startswith(_MINE)]
    try:
        settings = PlanSettings().with_values(mine)
    except SettingsError as error:
        raise SettingsError(f"--set {_MINE}{error}") from None
    try:
        recipe = recipe_named(options.recipe).with_values(others)
    except SettingsError as error:
        raise SettingsError(_as_option(error)) from None
    job = Job(verb="plan", recipe=recipe, out=options.out.rstrip("/"))
    prepare_stores(job)
    if options.dry_run:
        print(settings.to_json())
        return
    if settings.rates is not None and settings.node is None:
        raise SettingsError(
            "--set plan.node: given rates are of no machine here; name a node of the price list "
            f"{settings.prices}"
        )
    # Before a minute is spent.
    counts_of(job, settings)
    node_of(settings, prices=price_list(settings.prices))
    sizes = model_sizes(recipe.model)
    rates = given_rates(settings.rates) if settings.rates else _probed(job, settings, sizes=sizes)
    plan = plan_run(job, settings, rates=rates, sizes=sizes)
    compared = compare(job, plan.stages)
    print("\n".join(format_plan(plan)))
    if any(one.measured is not None for one in compared):
        print("\n".join(["", f"beside the run in {job.out}", "", *comparison(compared)]))
    values = {
        **to_values(plan),
        "assumptions": assumptions(plan),
        "compared": [{**asdict(one), "ratio": one.ratio} for one in compared],
    }
    text = json.dumps(values, indent=1, allow_nan=False)
    replace_object(job.url("plan.json"), f"{text}\n".encode())
    print(f"\n{job.url('plan.json')}")


def _as_option(error: SettingsError) -> str:
    text = without_secret(error)
    return text if text.startswith("--") else f"--set {text}"


def _probed(job: Job, settings: PlanSettings, *, sizes: ModelSizes) -> Rates:
    """What a probe measured in this run's folder, or measures now."""
    place = job.url("rates.json")
    if exists(place):
        try:
            return Rates.parse(json.loads(read_bytes(place)))
        except (ValueError, AttributeError) as error:
            raise SettingsError(f"--out {job.out}: rates.json holds no rates ({error}); remove it") from None
    workload = Workload(
        job=job, settings=settings, sizes=sizes, counts=counts_of(job, settings), png_share=1.0
    )
    rates = probe(
        job,
        sizes=sizes,
        efficient=workload.efficient,
        on_part=lambda part: print(f"  measuring {part}", flush=True),
    )
    replace_object(place, f"{rates.to_json()}\n".encode())
    return rates


if __name__ == "__main__":
    exit_process(main())
