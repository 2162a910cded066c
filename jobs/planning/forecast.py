"""Work, a cluster and rates in; seconds, worker-hours and money of each stage out. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.planning.prices import NodeType, StoragePrices
from jobs.planning.rates import Rates, WorkKind
from jobs.planning.requests import NO_REQUESTS, Requests, TableWrites, TrainingReads
from jobs.planning.settings import Market

StartupKind = Literal["none", "job", "training"]
NodeRole = Literal["tables", "training"]
"""Of a stage: a unit of a table that was lost is made again, a training stands still."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """So many units of a kind.

    Attributes:
        kind: of work.
        units: how many.
        gmacs: of the network in one of them; None where there is none, or the rate's own is meant.
        each: whether every worker does them all, or one while the others wait; else they share them.
    """

    kind: WorkKind
    units: float
    gmacs: float | None = None
    each: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Workers of one kind in a stage, and what they do, one thing after the other.

    Attributes:
        name: of them.
        works: what they do.
        workers: how many the recipe has.
        on: what each takes up: an accelerator, where there are some, or a core in any case.
        most: more of them would have nothing to do; None for no limit.
    """

    name: str
    works: tuple[Work, ...]
    workers: int
    on: Literal["accelerator", "core"]
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """What one worker holds at its highest, in bytes.

    Attributes:
        networks: weights, and where they are trained gradients, the optimizer's moments and the average.
        activations: of the largest forward and backward pass.
    """

    networks: float
    activations: float

    @property
    def peak(self) -> float:
        """Of both."""
        return self.networks + self.activations


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One step of a run.

    Attributes:
        name: of it.
        verb: the job that does it.
        rows: that it reads.
        parts: which go on at the same time.
        start: what passes before and after.
        leaves: bytes of what it makes.
        writing: of a table; None for none.
        reading: of a training; None for none.
        memory: of a worker of its network; None where it has none.
        local: whether it runs in the driver's process alone.
    """

    name: str
    verb: str
    rows: int
    parts: tuple[WorkerGroup, ...]
    start: StartupKind = "none"
    leaves: float = 0.0
    writing: TableWrites | None = None
    reading: TrainingReads | None = None
    memory: PeakMemory | None = None
    local: bool = False

    @property
    def sort(self) -> NodeRole:
        """Which nodes it runs on."""
        return "training" if self.start == "training" else "tables"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many nodes of a type.

    Attributes:
        name: of the type.
        node: the type.
        nodes: how many.
    """

    name: str
    node: NodeType
    nodes: int

    def workers(self, part: WorkerGroup) -> int:
        """How many of a part's workers there are: one an accelerator, or as the recipe has them on cores."""
        if self.node.accelerators:
            found = self.nodes * (self.node.accelerators if part.on == "accelerator" else self.node.cores)
        else:
            found = self.nodes * min(part.workers, self.node.cores)
        return max(1, found if part.most is None else min(found, part.most))


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """What a stage takes on a cluster.

    Attributes:
        stage: which.
        workers: of its network, or where it has none of its slowest part.
        slowest: the part that the others wait for.
        start_seconds: before and after the work.
        work_seconds: of the work.
        worker_hours: that accelerators are at work; cores, where the nodes have none.
        network_seconds: that the workers of its network are at work, together.
        nodes: that it takes up.
        cost: of those nodes.
        requests: to the object store.
        request_cost: of those.
    """

    stage: PlannedStage
    workers: int
    slowest: str
    start_seconds: float
    work_seconds: float
    worker_hours: float
    network_seconds: float
    nodes: int
    cost: float
    requests: Requests = field(default=NO_REQUESTS)
    request_cost: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.start_seconds + self.work_seconds


def forecast(
    stages: Sequence[PlannedStage],
    *,
    cluster: Cluster,
    rates: Rates,
    markets: Mapping[NodeRole, Market],
    storage: StoragePrices,
) -> list[StageForecast]:
    """What each stage takes; one after the other, as they read what those before them wrote.

    Raises:
        RateError: if the rates say nothing of a kind of work.
    """
    found, ray_runs = list[StageForecast](), False
    for stage in stages:
        start = 0.0 if stage.start == "none" else getattr(rates.starts, stage.start)
        if stage.start != "none" and not ray_runs:
            start, ray_runs = start + rates.starts.ray, True
        found.append(
            _forecast(
                stage,
                start=start,
                cluster=cluster,
                rates=rates,
                market=markets[stage.sort],
                storage=storage,
            )
        )
    return found


def _forecast(
    stage: PlannedStage,
    *,
    start: float,
    cluster: Cluster,
    rates: Rates,
    market: Market,
    storage: StoragePrices,
) -> StageForecast:
    cluster = Cluster(name=cluster.name, node=cluster.node, nodes=1) if stage.local else cluster
    times = {part.name: _seconds(part, cluster=cluster, rates=rates, sort=stage.sort) for part in stage.parts}
    slowest = max(times, key=lambda name: times[name])
    work = max(times[slowest], _on_all_cores(stage, times, cluster=cluster))
    requests = NO_REQUESTS
    if stage.writing is not None:
        requests += stage.writing.requests(work)
    networks = [part for part in stage.parts if part.on == "accelerator"]
    shown = networks[0] if networks else next(part for part in stage.parts if part.name == slowest)
    if stage.reading is not None:
        requests += stage.reading.requests(workers=cluster.workers(shown))
    counted = networks if cluster.node.accelerators else stage.parts
    return StageForecast(
        stage=stage,
        workers=cluster.workers(shown),
        slowest=slowest,
        start_seconds=start,
        work_seconds=work,
        worker_hours=sum(times[part.name] * cluster.workers(part) for part in counted) / 3600.0,
        network_seconds=sum(times[part.name] * cluster.workers(part) for part in networks),
        nodes=cluster.nodes,
        cost=(start + work) / 3600.0 * cluster.nodes * cluster.node.price(market),
        requests=requests,
        request_cost=requests.cost(storage),
    )


def _seconds(part: WorkerGroup, *, cluster: Cluster, rates: Rates, sort: NodeRole) -> float:
    """Of a part, were it alone."""
    workers = cluster.workers(part)
    seconds = sum(
        work.units * rates.seconds(work.kind, work.gmacs) / (1 if work.each else workers)
        for work in part.works
    )
    cores = cluster.nodes * cluster.node.cores
    crowded = not cluster.node.accelerators and workers > 1 and workers >= cores
    crowding = rates.crowding.trainings if sort == "training" else rates.crowding.tables
    return seconds * (crowding if crowded else 1.0)


def _on_all_cores(stage: PlannedStage, times: dict[str, float], *, cluster: Cluster) -> float:
    """Seconds that the parts take at least where they share the cores of nodes without accelerators."""
    if cluster.node.accelerators:
        return 0.0
    cores = cluster.nodes * cluster.node.cores
    return sum(times[part.name] * cluster.workers(part) for part in stage.parts) / cores
