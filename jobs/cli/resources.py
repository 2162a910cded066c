"""Connects a job to its cluster, after a check that the cluster can run the job's workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from jobs.cli.job import Job
from jobs.runtime.cluster import connect
from jobs.runtime.resources import Demand
from jobs.training.settings import TrainerSettings
from pipelines.ray_data.settings import Pool
from snapfusion.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.ray_data.execution import PipelineStage, Runner
    from pipelines.ray_data.shuffle import RayRows, Read


def connect_for(job: Job, section: str) -> None:
    """Connect to Ray, and check that the workers of a section of the recipe, as "pairs", can run.

    Raises:
        SettingsError: if a cluster of this machine alone cannot run them.
        ResourcesUnavailable: if a shared one does not offer their resources in time.
    """
    connect(job.recipe.cluster, demands_of(section_of(job, section), name=section))


def section_of(job: Job, section: str) -> Any:  # noqa: ANN401 - settings
    """A section of the job's recipe by its dotted name."""
    return reduce(getattr, section.split("."), job.recipe)


def runner(job: Job, section: str, *, new_table: str = "") -> Runner:
    """`run_on_ray` on the job's cluster, connecting only if there is something to run.

    Args:
        job: whose cluster it is.
        section: of the recipe, whose workers run.
        new_table: URL of a table. If it does not exist, the cluster is checked at once: a table whose workers
            cannot run is not created.
    """
    from pipelines.ray_data.execution import run_on_ray
    from pipelines.tables.table import is_table

    if new_table and not is_table(new_table):
        connect_for(job, section)

    def run(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
        left = iter(items)
        # Only the first is planned before Ray takes them: there may be more than fit in memory.
        if first := list(itertools.islice(left, 1)):
            connect_for(job, section)
            yield from run_on_ray(itertools.chain(first, left), stages)

    return run


def reader(job: Job, section: str) -> Read:
    """`read_on_ray` on the job's cluster, connecting only if something is read."""
    from pipelines.ray_data.shuffle import read_on_ray

    def read(items: Sequence[Any], function: Callable[[Any], pa.Table]) -> RayRows:
        connect_for(job, section)
        return read_on_ray(items, function)

    return read


def demands_of(settings: Settings, *, name: str) -> list[Demand]:
    """Groups of workers that must run at the same time, from a tree of settings.

    The pools that stand side by side are one pipeline, of which one actor each must run; a training needs
    all its workers, or `min_workers`.
    """
    values = {key: getattr(settings, key) for key in type(settings).model_fields}
    pools = {key: value for key, value in values.items() if isinstance(value, Pool)}
    demands = [_pool_demand(pool, name=f"{name}.{key}") for key, pool in pools.items()]
    if len(pools) > 1:
        bundles = tuple(bundle for demand in demands for bundle in demand.bundles)
        demands.append(Demand(setting=name, bundles=bundles, labels={}))
    for key, value in values.items():
        if isinstance(value, TrainerSettings):
            demands.append(_training_demand(value, name=f"{name}.{key}"))
        elif isinstance(value, Settings) and not isinstance(value, Pool):
            demands += demands_of(value, name=f"{name}.{key}")
    return [demand for demand in demands if demand.bundles]


def _pool_demand(pool: Pool, *, name: str) -> Demand:
    return _demand(name, cpus=pool.cpus, gpus=pool.gpus, count=1, labels=pool.labels)


def _training_demand(settings: TrainerSettings, *, name: str) -> Demand:
    return _demand(
        name,
        cpus=settings.cpus_per_worker,
        gpus=1.0 if settings.use_gpu else 0.0,
        count=settings.min_workers or settings.num_workers,
        labels=settings.labels,
    )


def _demand(name: str, *, cpus: float, gpus: float, count: int, labels: dict[str, str]) -> Demand:
    worker = {resource: amount for resource, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return Demand(setting=name, bundles=(worker,) * count if worker else (), labels=labels)
