"""Plans a run: combines a recipe, a cluster, rates and prices into a forecast."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.planning.break_even import BreakEven, UnitPrices, break_even
from jobs.planning.forecast import Cluster, StageForecast, forecast
from jobs.planning.prices import NodeType, PriceList, price_list
from jobs.planning.rates import Rates
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Counts, Workload
from pipelines.sources import SourceError
from pipelines.sources.webdataset import count_rows, list_shards
from snapfusion.models.network_sizes import NetworkSizes
from snapfusion.settings import SettingsError, digest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Forecast of a run.

    Attributes:
        job: the recipe and its run.
        settings: of the planner.
        counts: of rows.
        rates: from which times follow.
        prices: from which costs follow.
        cluster: of all figures but `by_nodes`.
        stages: forecasts on that cluster.
        by_nodes: (nodes, seconds, cost) of all stages together.
        unplanned: jobs of the run that have no rate.
        break_even: precomputed against online targets, for each student.
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
        """Cost of storing the output of all stages for `settings.months`."""
        gigabytes = sum(one.stage.output_bytes for one in self.stages) / 1e9
        return gigabytes * self.prices.storage.gb_month * self.settings.months

    @property
    def request_cost(self) -> float:
        """Cost of all storage requests."""
        return sum(one.request_cost for one in self.stages)

    def to_values(self) -> dict[str, Any]:
        """The plan as JSON values."""
        cluster = self.cluster
        return {
            "recipe": self.job.recipe.name,
            "settings": self.job.recipe.digest(),
            "plan": self.settings.to_values(),
            "counts": asdict(self.counts),
            "cluster": {"name": cluster.name, "nodes": cluster.nodes, "node": cluster.node.to_values()},
            "stages": [_stage_values(one) for one in self.stages],
            "by_nodes": [
                dict(zip(("nodes", "seconds", "cost"), figures, strict=True)) for figures in self.by_nodes
            ],
            "storage_cost": self.stored_cost,
            "request_cost": self.request_cost,
            "break_even": [
                {**asdict(one), "pays_from": None if math.isinf(one.pays_from) else one.pays_from}
                for one in self.break_even
            ],
            "currency": self.prices.currency,
            "prices": {
                "name": self.prices.name,
                "date": self.prices.date,
                "sha256": digest(self.prices.to_values()),
            },
            "rates": self.rates.to_values(),
        }


def _stage_values(one: StageForecast) -> dict[str, Any]:
    stage = one.stage
    figures = ("workers", "slowest", "start_seconds", "work_seconds", "worker_hours", "cost", "request_cost")
    return {
        "name": stage.name,
        "verb": stage.verb,
        "rows": stage.rows,
        "leaves_bytes": stage.output_bytes,
        **{name: getattr(one, name) for name in figures},
        "requests": asdict(one.requests),
        "peak_bytes": None if stage.memory is None else stage.memory.peak,
    }


def plan_run(job: Job, settings: PlanSettings, *, rates: Rates, sizes: NetworkSizes) -> Plan:
    """Forecast a run from given rates.

    Raises:
        SettingsError: if the number of rows or captions, the node or a step is unknown.
        RateError: if the rates lack a kind of work.
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
    clusters = [
        Cluster(name=settings.node or "this machine", node=node, nodes=nodes) for nodes in settings.nodes
    ]
    forecasts = [
        forecast(
            stages,
            cluster=cluster,
            rates=rates,
            markets={"tables": settings.tables_on, "training": settings.trainings_on},
            storage=prices.storage,
        )
        for cluster in clusters
    ]
    return Plan(
        job=job,
        settings=settings,
        counts=counts,
        rates=rates,
        prices=prices,
        cluster=clusters[-1],
        stages=tuple(forecasts[-1]),
        by_nodes=tuple(
            (cluster.nodes, sum(one.seconds for one in stages), sum(one.cost for one in stages))
            for cluster, stages in zip(clusters, forecasts, strict=True)
        ),
        unplanned=tuple(workload.unplanned),
        break_even=tuple(_break_even(workload, rates=rates, node=node, prices=prices)),
    )


def counts_of(job: Job, settings: PlanSettings) -> Counts:
    """Rows of a run.

    Raises:
        SettingsError: if neither settings nor sidecars say how many there are.
    """
    source = settings.rows or _source_rows(job)
    latents = max(1, round(source * settings.kept))
    captions = job.recipe.captions
    if settings.captions is None and captions.url is not None and captions.limit is None:
        raise SettingsError(
            f"--set plan.captions: the number of captions in {captions.url} is not known; give it"
        )
    limit = settings.captions or (min(captions.limit, latents) if captions.limit else latents)
    return Counts(source=source, latents=latents, captions=limit)


def _source_rows(job: Job) -> int:
    source = job.recipe.source
    if source.url is None:
        return source.scenes
    try:
        rows = [count_rows(shard) for shard in list_shards(shards_url(job))]
    except SourceError as error:
        raise SettingsError(f"--set plan.rows: the number of rows is not known; give it ({error})") from None
    if missing := rows.count(None):
        raise SettingsError(
            f"--set plan.rows: the number of rows is not known; give it ({missing} of {len(rows)} shards at "
            f"{source.url} have no sidecar that counts them)"
        )
    return sum(count for count in rows if count is not None)


def node_of(settings: PlanSettings, *, prices: PriceList) -> NodeType:
    """The node type given by `plan.node`, or this machine at no price.

    Raises:
        SettingsError: if the price list has no such node.
    """
    if settings.node is None:
        return _this_machine()
    if settings.node not in prices.nodes:
        raise SettingsError(
            f"--set plan.node={settings.node}: the price list {prices.name} has no such node; accepted are "
            f"{', '.join(prices.nodes)}"
        )
    return prices.nodes[settings.node]


def _this_machine() -> NodeType:
    gpus = torch.cuda.device_count()
    if gpus:
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return NodeType(
        accelerator=torch.cuda.get_device_name() if gpus else "",
        accelerators=gpus,
        cores=os.cpu_count() or 1,
        memory_gib=memory / 2**30,
        on_demand=0.0,
    )


def _break_even(workload: Workload, *, rates: Rates, node: NodeType, prices: PriceList) -> list[BreakEven]:
    settings, sizes = workload.settings, workload.sizes
    # Where nothing has a price, a second is worth a second on either side.
    unit_prices = UnitPrices(tables=1.0, training=1.0, stored=0.0)
    if node.on_demand:
        worker_seconds = (node.accelerators or node.cores) * 3600.0
        unit_prices = UnitPrices(
            tables=node.price(settings.tables_on) / worker_seconds,
            training=node.price(settings.trainings_on) / worker_seconds,
            stored=workload.target_bytes / 1e9 * prices.storage.gb_month * settings.months,
        )
    targets = workload.counts.latents * workload.job.recipe.targets.draws
    found = []
    for student in workload.students():
        teacher_gmacs = sizes.of(workload.architecture(student.teacher)).gmacs
        student_gmacs = sizes.of(workload.architecture(student.student or student.teacher)).gmacs
        trained = rates.seconds("train", student_gmacs)
        if student.gradient_checkpointing and not rates.checkpointed:
            trained += rates.seconds("pass", student_gmacs)
        found.append(
            break_even(
                student.name,
                student.steps,
                student_seconds=trained,
                teacher_seconds=rates.seconds("pass", teacher_gmacs),
                prices=unit_prices,
                stored_bytes=workload.target_bytes,
                used=student.loop.num_steps * student.loop.global_batch / targets,
                w_conditioned_teacher=workload.is_w_conditioned(student.teacher),
            )
        )
    return found
