"""A plan in words: tables of at most 100 columns, and what is assumed in a line each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from jobs.planning.actuals import ForecastComparison
from jobs.planning.break_even import BreakEven
from jobs.planning.forecast import StageForecast
from jobs.planning.memory import ALLOCATOR_SLACK
from jobs.planning.plan import Plan
from jobs.runtime.progress import format_duration

_GIB = 2**30
_DAY = 86_400.0
_MUCH = 1e12
"""Bytes that are worth a word."""


def format_plan(plan: Plan) -> list[str]:
    """The plan in lines of at most 100 columns."""
    counts, cluster, node = plan.counts, plan.cluster, plan.cluster.node
    kind = f"{node.accelerators} x {node.accelerator}" if node.accelerators else f"{node.cores} cores"
    many = "node" if cluster.nodes == 1 else "nodes"
    worker = "GPU" if node.accelerators else "core"
    kept = sum(one.stage.leaves for one in plan.stages) / 1e9
    currency = plan.prices.currency
    lines = [
        f"recipe {plan.job.recipe.name} on {cluster.nodes} {many} of {cluster.name}: {kind}",
        f"{counts.source:,} rows read, {counts.latents:,} encoded, {counts.captions:,} captions drawn",
        "",
        *stage_table(plan.stages, worker=worker),
        "",
        *nodes_table(plan.by_nodes),
        "",
        f"storage: {kept:,.1f} GB kept {plan.settings.months:g} months {money(plan.stored_cost)} {currency}, "
        f"requests {money(plan.request_cost)} {currency}",
    ]
    if plan.break_even:
        lines += ["", *break_even_lines(plan.break_even)]
    return [*lines, "", *(part for line in assumptions(plan) for part in wrapped(line))]


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on."""
    settings, node, rates = plan.settings, plan.cluster.node, plan.rates
    most = max((one.stage.memory.peak for one in plan.stages if one.stage.memory), default=0.0)
    lines = [
        f"times by {rates.name}, {rates.date}: {rates.about}",
        f"prices by {plan.prices.name}, {plan.prices.date}: {plan.prices.about}",
        f"tables on {settings.tables_on} nodes, trainings on {settings.trainings_on} ones, one after another",
        f"GiB of one worker at its highest: tensors counted on shapes, activations times {ALLOCATOR_SLACK} for gaps",
    ]
    if node.accelerators:
        workers = plan.cluster.nodes * node.accelerators
        lines.append(
            f"one worker an accelerator, {workers} in all: the recipe's pools and trainings need actors and "
            "num_workers to match"
        )
        if most > node.memory_gib * _GIB:
            lines.append(
                f"TOO LARGE: {most / _GIB:.1f} GiB are needed, an accelerator has {node.memory_gib:g}; take "
                "a smaller micro_batch or batch_size, or sharding=fsdp"
            )
    lines += _reading(plan)
    if plan.unplanned:
        lines.append(f"not in it: {', '.join(plan.unplanned)}")
    if settings.moment_bytes != 8.0:
        lines.append(
            f"an optimizer of {settings.moment_bytes:g} bytes a parameter is arithmetic: none is built here"
        )
    return lines


def _reading(plan: Plan) -> list[str]:
    """How much trainings read from the store, where that is much more than their rows."""
    found = [
        (one, one.stage.reading.read_bytes(workers=one.workers), one.stage.rows * one.stage.reading.row_bytes)
        for one in plan.stages
        if one.stage.reading is not None
    ]
    one, read, held = max(found, key=lambda found: found[1] / found[0].work_seconds, default=(None, 0.0, 1.0))
    if one is None or read < max(2 * held, _MUCH):
        return []
    rate = read / one.work_seconds / plan.cluster.nodes / 1e9
    return [
        f"{one.stage.name} reads {large(read)}B from the store, {rate:.2g} GB/s a node, {read / held:.0f} "
        "times its rows: workers' shares lie in files that others read too"
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def wrapped(line: str) -> list[str]:
    """A line with its dash, in as many lines as 100 columns need."""
    return textwrap.wrap(line, width=100, initial_indent="- ", subsequent_indent="  ")


def time_of(seconds: float) -> str:
    """Seconds as people plan with them."""
    return f"{seconds / _DAY:.1f} days" if seconds >= 2 * _DAY else format_duration(seconds)


def large(number: float) -> str:
    """A number with three digits and a letter."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def hours_of(hours: float) -> str:
    """Worker-hours."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def money(amount: float) -> str:
    """An amount, without its currency."""
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2f}"


def stage_table(forecasts: Sequence[StageForecast], *, worker: str) -> list[str]:
    """What each stage takes, and all of them."""
    head = ("stage", "rows", "waits for", f"{worker}-h", "wall time", "cost", "leaves", "GiB", "put", "get")
    rows = [head, *(_stage_row(one) for one in forecasts)]
    requests = [one.requests for one in forecasts]
    total = (
        "all",
        "",
        "",
        hours_of(sum(one.worker_hours for one in forecasts)),
        time_of(sum(one.seconds for one in forecasts)),
        money(sum(one.cost for one in forecasts)),
        f"{large(sum(one.stage.leaves for one in forecasts))}B",
        "",
        large(sum(one.put + one.list for one in requests)),
        large(sum(one.get for one in requests)),
    )
    return aligned([*rows, total])


def _stage_row(one: StageForecast) -> tuple[str, ...]:
    memory, asked = one.stage.memory, one.requests
    return (
        one.stage.name,
        large(one.stage.rows) if one.stage.rows else "",
        one.slowest,
        hours_of(one.worker_hours),
        time_of(one.seconds),
        money(one.cost),
        f"{large(one.stage.leaves)}B" if one.stage.leaves else "",
        f"{memory.peak / _GIB:.1f}" if memory else "",
        large(asked.put + asked.list) if asked.put else "",
        large(asked.get) if asked.get else "",
    )


def nodes_table(by_nodes: Sequence[tuple[int, float, float]]) -> list[str]:
    """Wall time and cost for each number of nodes."""
    return aligned(
        [
            ("nodes", *(str(nodes) for nodes, _, _ in by_nodes)),
            ("wall time", *(time_of(seconds) for _, seconds, _ in by_nodes)),
            ("cost", *(money(cost) for _, _, cost in by_nodes)),
        ]
    )


def break_even_lines(found: Sequence[BreakEven]) -> list[str]:
    """When targets pay beforehand, by student."""
    head = ("targets beforehand", "vanilla", "guided", "as mixed", "row", "pays from", "used here", "so")
    rows = [head, *(_break_even_row(one) for one in found)]
    return aligned(rows) if found else []


def _break_even_row(one: BreakEven) -> tuple[str, ...]:
    share = {name: f"-{100 * value:.0f} %" for name, value in one.saved.items()}
    return (
        one.student,
        share.get("vanilla", ""),
        share.get("guided", ""),
        share["mixed"],
        f"{large(one.stored_bytes)}B",
        "never" if math.isinf(one.pays_from) else f"{one.pays_from:.2f} uses",
        f"{one.used:.2f}",
        "table" if one.pays else "online",
    )


def comparison(found: Sequence[ForecastComparison]) -> list[str]:
    """Forecast beside what the run took."""
    rows: list[tuple[str, ...]] = [
        ("stage", "forecast", "measured", "forecast / measured", "measured is the")
    ]
    for one in found:
        took = "" if one.measured is None else f"{one.measured:.1f} s"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        rows.append((one.name, f"{one.forecast:.1f} s", took, ratio, one.what))
    known = [one for one in found if one.measured is not None]
    if known:
        forecast, measured = sum(one.forecast for one in known), sum(one.measured or 0.0 for one in known)
        what = f"{len(known)} of {len(found)} stages"
        rows.append(
            (
                "all that is measured",
                f"{forecast:.1f} s",
                f"{measured:.1f} s",
                f"{forecast / measured:.2f}",
                what,
            )
        )
    return aligned(rows)
