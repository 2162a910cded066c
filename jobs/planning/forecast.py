"""Forecasts time, worker-hours and cost of each stage of a run, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jobs.planning.prices import NodeType, StoragePrices
from jobs.planning.rates import Rates
from jobs.planning.settings import Market
from pipelines.costs.requests import Requests
from pipelines.costs.stage import StageCost, WorkerGroup

NodeRole = Literal["tables", "training"]
"""Spot nodes suit tables, whose lost units are computed again; a training waits while nodes are missing."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of one type.

    Attributes:
        name: of the node type.
        node: the node type.
        nodes: number of nodes.
    """

    name: str
    node: NodeType
    nodes: int

    @property
    def cores(self) -> int:
        """Cores of all nodes."""
        return self.nodes * self.node.cores

    def workers(self, group: WorkerGroup) -> int:
        """Number of workers of a group: as many as fit with accelerators, on cores as the recipe has them."""
        if self.node.accelerators:
            count = self.nodes * (self.node.accelerators if group.on == "accelerator" else self.node.cores)
        else:
            count = self.nodes * min(group.workers, self.node.cores)
        return max(1, count if group.max_workers is None else min(count, group.max_workers))


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """Time, cost and requests of a stage on a cluster.

    Attributes:
        stage: the stage.
        workers: of its network, or of its slowest group if it has none.
        slowest: name of the group that the others wait for.
        start_seconds: fixed time before and after the work.
        work_seconds: wall time of the work.
        worker_hours: busy hours of accelerators; of cores where nodes have none.
        network_seconds: busy seconds of the workers with a network, summed.
        cost: of the nodes.
        requests: to the object store.
        request_cost: of the requests.
    """

    stage: StageCost
    workers: int
    slowest: str
    start_seconds: float
    work_seconds: float
    worker_hours: float
    network_seconds: float
    cost: float
    requests: Requests
    request_cost: float

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.start_seconds + self.work_seconds


def forecast(
    stages: Sequence[StageCost],
    *,
    cluster: Cluster,
    rates: Rates,
    markets: Mapping[NodeRole, Market],
    storage: StoragePrices,
) -> list[StageForecast]:
    """Forecast each stage; they run one after the other, as each reads what earlier ones wrote.

    Raises:
        RateError: if `rates` lack a kind of work.
    """
    forecasts, ray_runs = list[StageForecast](), False
    for stage in stages:
        start = 0.0
        if stage.startup != "none":
            start = getattr(rates.starts, stage.startup) + (0.0 if ray_runs else rates.starts.ray)
            ray_runs = True
        role: NodeRole = "training" if stage.startup == "training" else "tables"
        on = replace(cluster, nodes=1) if stage.local else cluster
        price = on.nodes * on.node.price(markets[role])
        forecasts.append(_forecast(stage, start=start, cluster=on, rates=rates, price=price, storage=storage))
    return forecasts


def _forecast(
    stage: StageCost, *, start: float, cluster: Cluster, rates: Rates, price: float, storage: StoragePrices
) -> StageForecast:
    on_cores = not cluster.node.accelerators
    # Workers on every core slow each other down, and Ray's own processes take their share.
    contention = rates.crowding.trainings if stage.startup == "training" else rates.crowding.tables
    workers = {group.name: cluster.workers(group) for group in stage.groups}
    times, busy = dict[str, float](), dict[str, float]()
    for group in stage.groups:
        count = workers[group.name]
        seconds = sum(
            work.units * rates.seconds(work.kind, work.gmacs) / (1 if work.replicated else count)
            for work in group.works
        )
        times[group.name] = seconds * (contention if on_cores and 1 < count >= cluster.cores else 1.0)
        busy[group.name] = times[group.name] * count
    slowest = max(times, key=lambda name: times[name])
    # Groups share the cores, so a stage takes at least as long as all cores need for everything.
    work = max(times[slowest], sum(busy.values()) / cluster.cores if on_cores else 0.0)
    networks = [group.name for group in stage.groups if group.on == "accelerator"]
    shown = workers[networks[0] if networks else slowest]
    requests = Requests()
    if stage.writes is not None:
        requests += stage.writes.requests(work)
    if stage.reads is not None:
        requests += stage.reads.requests(workers=shown)
    return StageForecast(
        stage=stage,
        workers=shown,
        slowest=slowest,
        start_seconds=start,
        work_seconds=work,
        worker_hours=sum(busy[name] for name in (times if on_cores else networks)) / 3600.0,
        network_seconds=sum(busy[name] for name in networks),
        cost=(start + work) / 3600.0 * price,
        requests=requests,
        request_cost=storage.request_cost(requests),
    )
