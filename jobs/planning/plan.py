"""What a run will take: a recipe, a cluster, rates and prices put together."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.planning.break_even import BreakEven, UnitPrices, break_even
from jobs.planning.forecast import Cluster, NodeRole, StageForecast, forecast
from jobs.planning.prices import NodeType, PriceList, price_list
from jobs.planning.rates import Rates
from jobs.planning.settings import Market, PlanSettings
from jobs.planning.sizes import ModelSizes
from jobs.planning.workload import Counts, Workload
from pipelines.sources import SourceError
from pipelines.sources.webdataset import count_rows, list_shards
from snapfusion.settings import SettingsError, digest

_HERE = "this machine"
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will take.

    Attributes:
        job: the recipe, and where its run is to be.
        settings: the planner's.
        counts: rows.
        rates: by which times were found.
        prices: by which costs were found.
        cluster: that all but `by_nodes` is told for.
        stages: what each takes there.
        by_nodes: (nodes, seconds, cost) of all stages.
        unplanned: steps of the run that no rate tells the time of.
        break_even: of each student that is distilled.
    """

    job: Job
    settings: PlanSettings
    counts: Counts
    rates: Rates
    prices: PriceList
    cluster: Cluster
    stages: tuple[StageForecast, ...]
    by_nodes: tuple[tuple[int, float, float], ...]
    unplanned: tuple[str, ...]
    break_even: tuple[BreakEven, ...]

    @property
    def stored_cost(self) -> float:
        """Of all that the stages leave, for as long as it is kept."""
        gigabytes = sum(one.stage.leaves for one in self.stages) / 1e9
        return gigabytes * self.prices.storage.gb_month * self.settings.months

    @property
    def request_cost(self) -> float:
        """Of all requests."""
        return sum(one.request_cost for one in self.stages)


def plan_run(job: Job, settings: PlanSettings, *, rates: Rates, sizes: ModelSizes) -> Plan:
    """What a run will take, by given rates.

    Raises:
        SettingsError: if rows, captions or the node are not known, or a step cannot be planned.
        RateError: if the rates say nothing of a kind of work.
    """
    prices, counts = price_list(settings.prices), counts_of(job, settings)
    node = node_of(settings, prices=prices)
    workload = Workload(
        job=job,
        settings=settings,
        sizes=sizes,
        counts=counts,
        png_share=rates.png_share,
        checkpointed=rates.checkpointed,
    )
    stages = workload.stages()
    markets: dict[NodeRole, Market] = {"tables": settings.tables_on, "training": settings.trainings_on}

    def on(nodes: int) -> list[StageForecast]:
        cluster = Cluster(name=settings.node or _HERE, node=node, nodes=nodes)
        return forecast(stages, cluster=cluster, rates=rates, markets=markets, storage=prices.storage)

    found = {nodes: on(nodes) for nodes in settings.nodes}
    last = settings.nodes[-1]
    return Plan(
        job=job,
        settings=settings,
        counts=counts,
        rates=rates,
        prices=prices,
        cluster=Cluster(name=settings.node or _HERE, node=node, nodes=last),
        stages=tuple(found[last]),
        by_nodes=tuple(
            (nodes, sum(one.seconds for one in told), sum(one.cost for one in told))
            for nodes, told in found.items()
        ),
        unplanned=tuple(workload.unplanned),
        break_even=tuple(_break_even(workload, rates=rates, node=node, prices=prices)),
    )


def counts_of(job: Job, settings: PlanSettings) -> Counts:
    """The rows that a run has to do with.

    Raises:
        SettingsError: if neither settings nor sidecars say how many there are.
    """
    source = settings.rows or _rows_of_source(job)
    latents = max(1, round(source * settings.kept))
    wanted = job.recipe.captions
    if settings.captions is None and wanted.url is not None and wanted.limit is None:
        raise SettingsError(f"--set plan.captions: say how many captions of {wanted.url} are drawn")
    captions = settings.captions or (min(wanted.limit, latents) if wanted.limit else latents)
    return Counts(source=source, latents=latents, captions=captions)


def _rows_of_source(job: Job) -> int:
    source = job.recipe.source
    if source.url is None:
        return source.scenes
    try:
        counted = [count_rows(shard) for shard in list_shards(shards_url(job))]
    except SourceError as error:
        raise SettingsError(f"--set plan.rows: say how many rows there are; {error}") from None
    known = [rows for rows in counted if rows is not None]
    if len(known) < len(counted):
        raise SettingsError(
            f"--set plan.rows: say how many rows there are; {len(counted) - len(known)} of "
            f"{len(counted)} shards at {source.url} have no sidecar that counts them"
        )
    return sum(known)


def node_of(settings: PlanSettings, *, prices: PriceList) -> NodeType:
    """The node type that is planned with.

    Raises:
        SettingsError: if the price list has no such node.
    """
    if settings.node is None:
        return this_machine()
    if settings.node not in prices.nodes:
        raise SettingsError(
            f"--set plan.node={settings.node}: the price list {prices.name} has no such node; "
            f"{', '.join(prices.nodes)} are accepted"
        )
    return prices.nodes[settings.node]


def this_machine() -> NodeType:
    """The machine that this runs on, at no price."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = torch.cuda.device_count()
    if found:
        memory = torch.cuda.get_device_properties(0).total_memory
    return NodeType(
        accelerator=torch.cuda.get_device_name() if found else "",
        accelerators=found,
        cores=os.cpu_count() or 1,
        memory_gib=memory / _GIB,
        on_demand=0.0,
    )


def _break_even(workload: Workload, *, rates: Rates, node: NodeType, prices: PriceList) -> list[BreakEven]:
    settings = workload.settings
    workers = (node.accelerators or node.cores) * 3600.0
    free = not node.on_demand
    # Where nothing has a price, a second is worth a second on either side.
    price = UnitPrices(
        making=1.0 if free else node.price(settings.tables_on) / workers,
        training=1.0 if free else node.price(settings.trainings_on) / workers,
        stored=0.0 if free else workload.target_bytes / 1e9 * prices.storage.gb_month * settings.months,
    )
    draws = workload.job.recipe.targets.draws
    return [
        break_even(
            student.name,
            student.steps,
            student=workload.sizes.of(workload.architecture(student.student or student.teacher)),
            teacher=workload.sizes.of(workload.architecture(student.teacher)),
            rates=rates,
            prices=price,
            stored_bytes=workload.target_bytes,
            again=student.gradient_checkpointing and not rates.checkpointed,
            told=workload.is_told(student.teacher),
            used=student.loop.num_steps * student.loop.global_batch / (workload.counts.latents * draws),
        )
        for student in workload.students()
    ]


def to_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "recipe": plan.job.recipe.name,
        "settings": plan.job.recipe.digest(),
        "plan": plan.settings.to_values(),
        "counts": asdict(plan.counts),
        "cluster": {
            "name": plan.cluster.name,
            "nodes": plan.cluster.nodes,
            "node": plan.cluster.node.to_values(),
        },
        "stages": [_stage_values(one) for one in plan.stages],
        "by_nodes": [
            {"nodes": nodes, "seconds": seconds, "cost": cost} for nodes, seconds, cost in plan.by_nodes
        ],
        "storage_cost": plan.stored_cost,
        "request_cost": plan.request_cost,
        "break_even": [
            {**asdict(one), "pays_from": None if math.isinf(one.pays_from) else one.pays_from}
            for one in plan.break_even
        ],
        "currency": plan.prices.currency,
        "prices": {
            "name": plan.prices.name,
            "date": plan.prices.date,
            "sha256": digest(plan.prices.to_values()),
        },
        "rates": plan.rates.to_values(),
    }


def _stage_values(one: StageForecast) -> dict[str, Any]:
    stage = one.stage
    return {
        "name": stage.name,
        "verb": stage.verb,
        "rows": stage.rows,
        "leaves_bytes": stage.leaves,
        "workers": one.workers,
        "slowest": one.slowest,
        "start_seconds": one.start_seconds,
        "work_seconds": one.work_seconds,
        "worker_hours": one.worker_hours,
        "cost": one.cost,
        "requests": asdict(one.requests),
        "request_cost": one.request_cost,
        "peak_bytes": None if stage.memory is None else stage.memory.peak,
    }
