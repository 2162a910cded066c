"""Formats a plan as tables of at most 100 columns, and its assumptions in a line each."""

import textwrap
from collections.abc import Sequence
from dataclasses import astuple

from jobs.planning.actuals import ForecastComparison
from jobs.planning.break_even import BreakEven
from jobs.planning.plan import Plan, StageForecast
from jobs.runtime.progress import format_duration
from pipelines.costs.stage import ALLOCATOR_SLACK

_GIB = 2**30
_DAY = 86_400.0
_MANY_BYTES = 1e12
"""Bytes read by a training from which the plan mentions them."""


def format_plan(plan: Plan) -> list[str]:
    """The plan in lines of at most 100 columns."""
    workload, cluster, node = plan.workload, plan.cluster, plan.cluster.node
    hardware = f"{node.accelerators} x {node.accelerator}" if node.accelerators else f"{node.cores} cores"
    nodes = "node" if cluster.nodes == 1 else "nodes"
    stored = sum(one.stage.output_bytes for one in plan.stages) / 1e9
    currency = plan.prices.currency
    totals = [(str(each["nodes"]), _time(each["seconds"]), _money(each["cost"])) for each in plan.by_nodes]
    return [
        f"recipe {workload.job.recipe.name} on {cluster.nodes} {nodes} of {cluster.name}: {hardware}",
        "{:,} rows read, {:,} encoded, {:,} captions for PAIRS".format(*astuple(workload.counts)),
        "",
        *_stage_table(plan.stages, worker="GPU" if node.accelerators else "core"),
        "",
        *_driver_table(plan.stages),
        "",
        *_align(*zip(("nodes", "wall time", "cost"), *totals, strict=True)),
        "",
        f"storage: {stored:,.1f} GB kept {workload.settings.months:g} months {_money(plan.stored_cost)} "
        f"{currency}, requests {_money(plan.request_cost)} {currency}",
        *(["", *_break_even_table(plan.break_even)] if plan.break_even else []),
        "",
        *(
            part
            for line in assumptions(plan)
            for part in textwrap.wrap(line, width=100, initial_indent="- ", subsequent_indent="  ")
        ),
    ]


def assumptions(plan: Plan) -> list[str]:
    """The assumptions behind the figures."""
    settings, node, rates = plan.workload.settings, plan.cluster.node, plan.workload.rates
    lines = [
        f"times by {rates.name}, {rates.date}: {rates.about}",
        f"prices by {plan.prices.name}, {plan.prices.date}: {plan.prices.about}",
        f"tables on {settings.tables_on} nodes, trainings on {settings.trainings_on} ones, one after another",
        f"GiB is the peak of one worker: tensors counted on shapes, activations times {ALLOCATOR_SLACK}",
        "the driver works alone after the last row of a table, when trainers are done, or all the time; its "
        f"GiB include {rates.driver_mib / 1024:.1f} of libraries",
    ]
    if node.accelerators:
        workers = plan.cluster.nodes * node.accelerators
        lines.append(
            f"one worker per accelerator, {workers} in all: set actors of pools and num_workers of trainings "
            "to match"
        )
        peak = max((one.stage.peak_bytes or 0.0) / _GIB for one in plan.stages)
        if peak > node.memory_gib:
            lines.append(
                f"TOO LARGE: {peak:.1f} GiB are needed, an accelerator has {node.memory_gib:g}; take "
                "a smaller micro_batch or batch_size, or sharding=fsdp"
            )
    lines += _heaviest_reads(plan)
    if unplanned := plan.workload.unplanned:
        lines.append(f"not included: {', '.join(unplanned)}")
    if settings.moment_bytes != 8.0:
        lines.append(
            f"an optimizer of {settings.moment_bytes:g} bytes per parameter is not implemented: arithmetic"
        )
    return lines


def _heaviest_reads(plan: Plan) -> list[str]:
    """The training that reads the store fastest, if it reads much more than its rows."""
    reads = [
        (one, reads.read_bytes(workers=one.workers), one.stage.rows * reads.row_bytes)
        for one in plan.stages
        if (reads := one.stage.reads) is not None
    ]
    if not reads:
        return []
    one, read, rows = max(reads, key=lambda found: found[1] / found[0].work_seconds)
    if read < max(2 * rows, _MANY_BYTES):
        return []
    rate = read / one.work_seconds / plan.cluster.nodes / 1e9
    return [
        f"{one.stage.name} reads {_short(read)}B from the store, {rate:.2g} GB/s per node, {read / rows:.0f} "
        "times its rows: workers read whole files of which they need a part"
    ]


def format_comparison(found: Sequence[ForecastComparison]) -> list[str]:
    """A table of forecast and measured times, at least one of which is measured."""
    known = [one for one in found if one.measured is not None]
    forecast, measured = sum(one.forecast for one in known), sum(one.measured or 0.0 for one in known)
    of = f"{len(known)} of {len(found)} stages"
    total = ForecastComparison("all that is measured", forecast, measured, of)
    rows = [("stage", "forecast", "measured", "forecast / measured", "measured is the")]
    for one in (*found, total):
        seconds = "" if one.measured is None else f"{one.measured:.1f} s"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        rows.append((one.name, f"{one.forecast:.1f} s", seconds, ratio, one.what))
    return [*_align(*rows), *_driver_comparison(known)]


def _driver_comparison(found: Sequence[ForecastComparison]) -> list[str]:
    """A table of the driver's forecast and measured time and memory; none if nothing was measured."""
    rows = [("driver", "alone: forecast", "measured", "peak: forecast", "measured")]
    for one in found:
        seconds = "" if one.driver_measured is None else f"{one.driver_measured:.1f} s"
        if (measured := one.driver_mib_measured) is not None:
            memory = (f"{one.driver_mib_forecast:,.0f} MiB", f"{measured:,.0f} MiB")
            rows.append((one.name, f"{one.driver_forecast:.1f} s", seconds, *memory))
    return ["", *_align(*rows)] if len(rows) > 1 else []


def _stage_table(stages: Sequence[StageForecast], *, worker: str) -> list[str]:
    head = ("stage", "rows", "waits for", f"{worker}-h", "wall time", "cost", "leaves", "GiB", "put", "get")
    rows = list[Sequence[str]]()
    for part in (*([one] for one in stages), stages):
        # The last row is that of all stages, in which zeros are shown.
        one = part[0].stage if part is not stages else None
        output = sum(each.stage.output_bytes for each in part)
        put = sum(each.requests.put + each.requests.list for each in part)
        get = sum(each.requests.get for each in part)
        rows.append(
            (
                one.name if one else "all",
                _short(one.rows) if one and one.rows else "",
                part[0].slowest if one else "",
                _hours(sum(each.worker_hours for each in part)),
                _time(sum(each.seconds for each in part)),
                _money(sum(each.cost for each in part)),
                f"{_short(output)}B" if output or not one else "",
                f"{one.peak_bytes / _GIB:.1f}" if one and one.peak_bytes else "",
                *(_short(count) if count or not one else "" for count in (put, get)),
            )
        )
    return _align(head, *rows)


def _driver_table(stages: Sequence[StageForecast]) -> list[str]:
    rows: list[tuple[str, ...]] = [("driver", "works alone", "of wall time", "mostly to", "GiB")]
    for one in stages:
        alone = one.alone_seconds
        longest = max(alone, key=lambda kind: alone[kind], default="")
        rows.append(_driver_row(one.stage.name, [one], longest.replace("_", " ")))
    return _align(*rows, _driver_row("all", stages, ""))


def _driver_row(name: str, stages: Sequence[StageForecast], longest: str) -> tuple[str, ...]:
    alone, whole = sum(one.driver_seconds for one in stages), sum(one.seconds for one in stages)
    share = f"{100 * alone / whole:.0f} %" if whole else ""
    return name, _time(alone), share, longest, f"{max(one.driver_bytes for one in stages) / _GIB:.1f}"


def _break_even_table(students: Sequence[BreakEven]) -> list[str]:
    rows = [("targets beforehand", "vanilla", "guided", "as mixed", "row", "pays from", "used here", "so")]
    for one in students:
        shares = {branch: f"-{100 * share:.0f} %" for branch, share in one.saved.items()}
        vanilla, guided, mixed = (shares.get(branch, "") for branch in ("vanilla", "guided", "mixed"))
        row, choice = f"{_short(one.stored_bytes)}B", "table" if one.pays else "online"
        pays_from = "never" if one.pays_from is None else f"{one.pays_from:.2f} uses"
        rows.append((one.student, vanilla, guided, mixed, row, pays_from, f"{one.used:.2f}", choice))
    return _align(*rows)


def _align(*rows: Sequence[str]) -> list[str]:
    """Rows as columns, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def _time(seconds: float) -> str:
    return f"{seconds / _DAY:.1f} days" if seconds >= 2 * _DAY else format_duration(seconds)


def _short(number: float) -> str:
    """Three digits and an SI prefix."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _money(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2f}"
