"""The one place where Ray is put round a stage.

A stage is a class whose instances take one thing and return one thing (or yield several). Here it becomes a
pool of actors; what passes between pools is one Ray row a unit, so a unit is never cut, merged or reordered
within itself. Results arrive as they are finished.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.ray_data.metrics import StageClock
from pipelines.ray_data.settings import Pool

MAX_ATTEMPTS = 3
"""How often a unit may take a worker process down before it is set aside."""


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """A stage and the pool it runs in.

    Attributes:
        build: makes the stage inside the actor; a class in an importable module.
        arguments: its keyword arguments.
        pool: the actors.
        give_up: what stands for the stage's result on an item that took down `MAX_ATTEMPTS` workers; None
            fails the job.
    """

    build: Callable[..., Callable[[Any], Any]]
    arguments: dict[str, Any]
    pool: Pool
    give_up: Callable[[Any], Any] | None = field(default=None)


Runner = Callable[[Iterable[Any], list[PipelineStage]], Iterator[Any]]
"""Sends items through stages and yields what comes out; `run_on_ray` is the one that jobs use."""


class CrashedTooOften(RuntimeError):
    """An item took down `MAX_ATTEMPTS` workers in a stage that cannot set it aside."""


def run_on_ray(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """Stream `items` through `stages` as Ray Data actor pools; yields results in order of completion.

    Memory is bounded by Ray Data's backpressure: a stage waits while the next one is full.
    """
    rows = [{"item": pickle.dumps(item), "key": str(number)} for number, item in enumerate(items)]
    if not rows:
        return
    context = ray.data.DataContext.get_current()
    # Every unit is a block of its own: the next stage, and the commit, need not wait for its neighbours.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.enable_progress_bars = False
    tries = on_driver_node(_AttemptCounter).remote()
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for number, stage in enumerate(stages):
        # The first stage has as much to do as there are items; the later ones may have more.
        actors = min(stage.pool.actors, len(rows)) if number == 0 else stage.pool.actors
        dataset = dataset.map_batches(
            _StageActor,
            fn_constructor_args=(number, stage, tries),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=stage.pool.cpus,
            num_gpus=stage.pool.gpus,
            label_selector=stage.pool.labels or None,
        )
    for row in dataset.iter_rows():
        yield pickle.loads(row["item"])


def on_driver_node(actor: type) -> Any:  # noqa: ANN401 - an actor class
    """A class of actors that live on the driver's own node, take none of its CPUs and die with it alone.

    Left to itself Ray puts an actor that asks for nothing on any node: one that is taken away ends the job.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here)


class _AttemptCounter:
    """Counts how often each stage began each item; an actor, so it outlives the workers that die."""

    def __init__(self) -> None:
        self.begun: dict[tuple[int, str], int] = {}

    def begin(self, stage: int, key: str) -> int:
        self.begun[stage, key] = self.begun.get((stage, key), 0) + 1
        return self.begun[stage, key]


class _StageActor:
    """A stage inside an actor: bytes in, bytes out."""

    def __init__(self, number: int, stage: PipelineStage, tries: Any) -> None:  # noqa: ANN401 - an actor handle
        self.number = number
        self.stage = stage
        self.tries = tries
        self.clock = StageClock(stage.build.__name__)
        self.work = stage.build(**stage.arguments)
        self.clock.wait()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        key = str(batch["key"][0])
        tried = ray.get(self.tries.begin.remote(self.number, key))
        results = self._pickled(batch["item"][0], tried)
        for place in itertools.count():
            # Between two results the actor may be kept waiting by the stage that takes them.
            with self.clock.busy():
                result = next(results, None)
            if result is None:
                return
            yield {"item": [result], "key": [f"{key}.{place}"]}

    def _pickled(self, item: bytes, tried: int) -> Iterator[bytes]:
        yield from map(pickle.dumps, self._results(pickle.loads(item), tried))

    def _results(self, item: Any, tried: int) -> Iterator[Any]:  # noqa: ANN401
        if tried > MAX_ATTEMPTS:
            if self.stage.give_up is None:
                name = type(self.work).__name__
                raise CrashedTooOften(f"{name} took its worker down {MAX_ATTEMPTS} times on {item!r:.200}")
            yield self.stage.give_up(item)
            return
        if tried > 1 and hasattr(self.work, "carefully"):
            result = self.work.carefully(item)
        else:
            result = self.work(item)
        if isinstance(result, Iterator):
            yield from result
        else:
            yield result
