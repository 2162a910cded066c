"""Plans a run: combines a recipe, a cluster, rates and prices into a forecast."""

import os
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.planning.break_even import BreakEven, break_even
from jobs.planning.forecast import Cluster, StageForecast
from jobs.planning.prices import NodeType, PriceList
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Counts, Workload
from pipelines.datasets.preview import count_shard_rows
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from snapfusion.settings import SettingsError, digest


class Totals(NamedTuple):
    """Wall time in seconds and cost of all stages on so many nodes."""

    nodes: int
    seconds: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Forecast of a run.

    Attributes:
        workload: the stages of the recipe, and the rates from which times follow.
        prices: from which costs follow.
        cluster: of all figures but `by_nodes`.
        stages: forecasts on that cluster.
        by_nodes: totals for each number of nodes.
        break_even: precomputed against online targets, for each student.
    """

    workload: Workload
    prices: PriceList
    cluster: Cluster
    stages: list[StageForecast]
    by_nodes: list[Totals]
    break_even: list[BreakEven]

    @property
    def stored_cost(self) -> float:
        """Cost of storing the output of all stages for `settings.months`."""
        gigabytes = sum(one.stage.output_bytes for one in self.stages) / 1e9
        return gigabytes * self.prices.storage.gb_month * self.workload.settings.months

    @property
    def request_cost(self) -> float:
        """Cost of all storage requests."""
        return sum(one.request_cost for one in self.stages)

    def to_values(self) -> dict[str, Any]:
        """The plan as JSON values."""
        workload, cluster, prices = self.workload, self.cluster, self.prices
        return {
            "recipe": workload.job.recipe.name,
            "settings": workload.job.recipe.digest(),
            "plan": workload.settings.to_values(),
            "counts": asdict(workload.counts),
            "cluster": {"name": cluster.name, "nodes": cluster.nodes, "node": cluster.node.to_values()},
            "stages": [_stage_values(one) for one in self.stages],
            "by_nodes": [totals._asdict() for totals in self.by_nodes],
            "storage_cost": self.stored_cost,
            "request_cost": self.request_cost,
            "break_even": [asdict(one) for one in self.break_even],
            "currency": prices.currency,
            "prices": {"name": prices.name, "date": prices.date, "sha256": digest(prices.to_values())},
            "rates": workload.rates.to_values(),
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


def plan_run(workload: Workload, *, prices: PriceList, node: NodeType) -> Plan:
    """Forecast a run from given rates.

    Raises:
        SettingsError: if a step is unknown.
        RateError: if the rates lack a kind of work.
    """
    settings, stages, by_nodes = workload.settings, workload.stages(), list[Totals]()
    for nodes in settings.nodes:
        cluster = Cluster(
            name=settings.node or "this machine",
            node=node,
            nodes=nodes,
            rates=workload.rates,
            settings=settings,
            storage=prices.storage,
        )
        forecasts = cluster.forecast(stages)
        seconds, cost = sum(one.seconds for one in forecasts), sum(one.cost for one in forecasts)
        by_nodes.append(Totals(nodes, seconds, cost))
    return Plan(
        workload=workload,
        prices=prices,
        cluster=cluster,
        stages=forecasts,
        by_nodes=by_nodes,
        break_even=[
            break_even(workload, student, node=node, storage=prices.storage)
            for student in workload.students()
        ],
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
    limit = settings.captions or min(captions.limit or latents, latents)
    return Counts(source=source, latents=latents, captions=limit)


def _source_rows(job: Job) -> int:
    source, unknown = job.recipe.source, "--set plan.rows: the number of rows is not known; give it"
    if source.url is None:
        return source.scenes
    try:
        shards = list_shards(shards_url(job))
    except SourceError as error:
        raise SettingsError(f"{unknown} ({error})") from None
    rows, uncounted = count_shard_rows(shards)
    if uncounted:
        raise SettingsError(
            f"{unknown} ({uncounted} of {len(shards)} shards at {source.url} have no sidecar that counts "
            "them)"
        )
    return rows


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
