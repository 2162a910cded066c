"""Forecasts time, worker-hours and cost of each stage of a run, by arithmetic alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.planning.prices import NodeType, StoragePrices
from jobs.planning.rates import Rates
from jobs.planning.settings import PlanSettings
from pipelines.costs.requests import Requests
from pipelines.costs.stage import StageCost, WorkerGroup


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


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of one type, and what a forecast on them needs.

    Attributes:
        name: of the node type.
        node: the node type.
        nodes: number of nodes.
        rates: of the nodes.
        settings: of the planner.
        storage: prices of the object store.
    """

    name: str
    node: NodeType
    nodes: int
    rates: Rates
    settings: PlanSettings
    storage: StoragePrices

    def workers(self, group: WorkerGroup) -> int:
        """Number of workers of a group: as many as fit with accelerators, on cores as the recipe has them."""
        if self.node.accelerators:
            count = self.nodes * (self.node.accelerators if group.on == "accelerator" else self.node.cores)
        else:
            count = self.nodes * min(group.workers, self.node.cores)
        return max(1, count if group.max_workers is None else min(count, group.max_workers))

    def forecast(self, stages: Sequence[StageCost]) -> list[StageForecast]:
        """Forecast each stage; they run one after the other, as each reads what earlier ones wrote.

        Raises:
            RateError: if the rates lack a kind of work.
        """
        forecasts, ray_seconds = list[StageForecast](), self.rates.starts.ray
        for stage in stages:
            start = 0.0
            if stage.startup != "none":
                start, ray_seconds = getattr(self.rates.starts, stage.startup) + ray_seconds, 0.0
            on = replace(self, nodes=1) if stage.local else self
            forecasts.append(on._forecast(stage, start=start))
        return forecasts

    def _forecast(self, stage: StageCost, *, start: float) -> StageForecast:
        rates, training, on_cores = self.rates, stage.startup == "training", not self.node.accelerators
        cores = self.nodes * self.node.cores
        # Workers on every core slow each other down, and Ray's own processes take their share.
        contention = rates.crowding.trainings if training else rates.crowding.tables
        workers = {group.name: self.workers(group) for group in stage.groups}
        times = dict[str, float]()
        for group in stage.groups:
            count = workers[group.name]
            seconds = sum(
                work.units * rates.seconds(work.kind, work.gmacs) / (1 if work.replicated else count)
                for work in group.works
            )
            times[group.name] = seconds * (contention if on_cores and 1 < count >= cores else 1.0)
        busy = {name: seconds * workers[name] for name, seconds in times.items()}
        slowest = max(times, key=lambda name: times[name])
        # Groups share the cores, so a stage takes at least as long as all cores need for everything.
        work = max(times[slowest], sum(busy.values()) / cores if on_cores else 0.0)
        networks = [group.name for group in stage.groups if group.on == "accelerator"]
        shown = workers[networks[0] if networks else slowest]
        requests = stage.writes.requests(work) if stage.writes else Requests()
        if stage.reads:
            requests += stage.reads.requests(workers=shown)
        price = self.nodes * self.node.price(
            self.settings.trainings_on if training else self.settings.tables_on
        )
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
            request_cost=self.storage.request_cost(requests),
        )
