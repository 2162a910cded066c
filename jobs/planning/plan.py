"""Forecasts a run by arithmetic alone: time, worker-hours and cost of each stage, and totals by nodes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.planning.break_even import BreakEven, break_even
from jobs.planning.rates_and_prices import NodeType, PriceList, Rates, StoragePrices
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Counts, Workload
from pipelines.costs.requests import Requests
from pipelines.costs.stage import DriverCost, StageCost, WorkerGroup, WorkKind
from pipelines.datasets.preview import count_shard_rows
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from snapfusion.settings import SettingsError, digest

_FIGURES = (
    *("workers", "slowest", "start_seconds", "work_seconds", "worker_hours", "cost", "request_cost"),
    *("driver_seconds", "driver_bytes"),
)
"""Attributes of a stage's forecast that the plan's JSON takes as they are."""


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
        after_seconds: wall time after the last row, in which the driver works alone, by kind of work.
        driver_bytes: peak memory of the driver.
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
    after_seconds: Mapping[WorkKind, float]
    driver_bytes: float

    @property
    def alone_seconds(self) -> dict[WorkKind, float]:
        """Wall time in which the driver works alone, after the last row or all the time, by kind of work."""
        if self.stage.local:
            return {work.kind: self.work_seconds for group in self.stage.groups for work in group.works}
        return dict(self.after_seconds)

    @property
    def driver_seconds(self) -> float:
        """Wall time in which the driver works alone."""
        return sum(self.alone_seconds.values())

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.start_seconds + self.work_seconds + sum(self.after_seconds.values())


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A number of nodes of one type, their rates and prices, and the planner's settings."""

    node: NodeType
    nodes: int
    rates: Rates
    settings: PlanSettings
    storage: StoragePrices

    @property
    def name(self) -> str:
        """Name of the node type."""
        return self.settings.node or "this machine"

    def forecast(self, stages: Sequence[StageCost]) -> list[StageForecast]:
        """Forecast each stage; they run one after the other, as each reads what earlier ones wrote.

        Raises:
            SettingsError: if the rates lack a kind of work.
        """
        forecasts, ray_seconds = list[StageForecast](), self.rates.starts.ray
        for stage in stages:
            start = 0.0
            if stage.startup != "none":
                start, ray_seconds = getattr(self.rates.starts, stage.startup) + ray_seconds, 0.0
            on = replace(self, nodes=1) if stage.local else self
            forecasts.append(on._forecast(stage, start=start))
        return forecasts

    def _workers(self, group: WorkerGroup) -> int:
        """Number of workers of a group: as many as fit with accelerators, on cores as the recipe has them."""
        if self.node.accelerators:
            count = self.nodes * (self.node.accelerators if group.on == "accelerator" else self.node.cores)
        else:
            count = self.nodes * min(group.workers, self.node.cores)
        return max(1, count if group.max_workers is None else min(count, group.max_workers))

    def _forecast(self, stage: StageCost, *, start: float) -> StageForecast:
        training, on_cores = stage.startup == "training", not self.node.accelerators
        cores = self.nodes * self.node.cores
        # Workers on every core slow each other down, and Ray's own processes take their share.
        contention = self.rates.crowding.trainings if training else self.rates.crowding.tables
        workers = {group.name: self._workers(group) for group in stage.groups}
        times = dict[str, float]()
        for group in stage.groups:
            count = workers[group.name]
            seconds = sum(
                self.rates.seconds(work) / (1 if work.replicated else count) for work in group.works
            )
            times[group.name] = seconds * (contention if on_cores and 1 < count >= cores else 1.0)
        busy = {name: seconds * workers[name] for name, seconds in times.items()}
        slowest = max(times, key=lambda name: times[name])
        # Groups share the cores, so a stage takes at least as long as all cores need for everything.
        work = max(times[slowest], sum(busy.values()) / cores if on_cores else 0.0)
        networks = [group.name for group in stage.groups if group.on == "accelerator"]
        shown = workers[networks[0] if networks else slowest]
        requests = Requests()
        if stage.writes:
            requests = stage.writes.requests(work)
        elif stage.reads:
            requests = stage.reads.requests(workers=shown)
        market = self.settings.trainings_on if training else self.settings.tables_on
        after = self._after_seconds(stage.driver)
        return StageForecast(
            stage=stage,
            workers=shown,
            slowest=slowest,
            start_seconds=start,
            work_seconds=work,
            worker_hours=sum(busy[name] for name in (times if on_cores else networks)) / 3600.0,
            network_seconds=sum(busy[name] for name in networks),
            cost=(start + work + sum(after.values())) / 3600.0 * (self.nodes * self.node.price(market)),
            requests=requests,
            request_cost=self.storage.request_cost(requests),
            after_seconds=after,
            driver_bytes=self.rates.driver_mib * 2**20 + stage.driver.bytes_on(self.node.cores),
        )

    def _after_seconds(self, driver: DriverCost) -> dict[WorkKind, float]:
        """Seconds of each kind of a driver's work on the cores of its node."""
        cores, times = min(self.node.cores, driver.max_cores), dict[WorkKind, float]()
        for work in driver.works:
            seconds = self.rates.seconds(work) / (1 if work.replicated else cores)
            times[work.kind] = times.get(work.kind, 0.0) + seconds
        return times


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Forecast of a run.

    `stages` are forecasts on the `cluster`, `by_nodes` wall "seconds" and "cost" of all stages by number of
    "nodes", and `break_even` compares precomputed with online targets, for each student.
    """

    workload: Workload
    prices: PriceList
    cluster: Cluster
    stages: list[StageForecast]
    by_nodes: list[dict[str, float]]
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
            "stages": [
                {
                    **{name: getattr(one.stage, name) for name in ("name", "verb", "rows")},
                    "leaves_bytes": one.stage.output_bytes,
                    **{name: getattr(one, name) for name in _FIGURES},
                    "after_seconds": sum(one.after_seconds.values()),
                    "alone_seconds": one.alone_seconds,
                    "requests": asdict(one.requests),
                    "peak_bytes": one.stage.peak_bytes,
                }
                for one in self.stages
            ],
            "by_nodes": self.by_nodes,
            "storage_cost": self.stored_cost,
            "request_cost": self.request_cost,
            "break_even": [asdict(one) for one in self.break_even],
            "currency": prices.currency,
            "prices": {"name": prices.name, "date": prices.date, "sha256": digest(prices.to_values())},
            "rates": workload.rates.to_values(),
        }


def plan_run(workload: Workload, *, prices: PriceList, node: NodeType) -> Plan:
    """Forecast a run from given rates.

    Raises:
        SettingsError: if a step is unknown, or the rates lack a kind of work.
    """
    settings, storage, stages = workload.settings, prices.storage, workload.stages()
    clusters = [
        Cluster(node=node, nodes=nodes, rates=workload.rates, settings=settings, storage=storage)
        for nodes in settings.nodes
    ]
    forecasts = [cluster.forecast(stages) for cluster in clusters]
    return Plan(
        workload=workload,
        prices=prices,
        cluster=clusters[-1],
        stages=forecasts[-1],
        by_nodes=[
            {"nodes": nodes, "seconds": sum(one.seconds for one in on), "cost": sum(one.cost for one in on)}
            for nodes, on in zip(settings.nodes, forecasts, strict=True)
        ],
        break_even=[
            break_even(workload, student, node=node, storage=storage)
            for student in workload.students()
            if student.dmd2 is None  # it has no targets
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
    texts = settings.captions or min(captions.limit or latents, latents)
    return Counts(source=source, latents=latents, captions=texts)


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
        missing = f"{uncounted} of {len(shards)} shards at {source.url} have no sidecar that counts them"
        raise SettingsError(f"{unknown} ({missing})")
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
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = NodeType(cores=os.cpu_count() or 1, memory_gib=memory / 2**30, on_demand=0.0)
    if not (gpus := torch.cuda.device_count()):
        return machine
    gpu = torch.cuda.get_device_properties(0)
    added = {"accelerator": gpu.name, "accelerators": gpus, "memory_gib": gpu.total_memory / 2**30}
    return machine.model_copy(update=added)
