"""Runs stages as Ray Data actor pools.

A stage is a class whose instances take one item and return one (or yield several). Between pools each item is
one Ray row, so a unit is never cut, merged or reordered within itself. Results arrive in order of completion.
"""

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.ray_data.metrics import StageClock
from pipelines.ray_data.settings import Pool, window_items

MAX_ATTEMPTS = 3
"""Attempts at an item that kills its worker, before it is rejected."""


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """A stage and the pool it runs in.

    Attributes:
        build: creates the stage inside the actor; a class in an importable module.
        arguments: its keyword arguments.
        pool: the actors.
        give_up: gives the result for an item that killed `MAX_ATTEMPTS` workers; None fails the job.
    """

    build: Callable[..., Callable[[Any], Any]]
    arguments: dict[str, Any]
    pool: Pool
    give_up: Callable[[Any], Any] | None = None

    def create(self) -> Callable[..., Any]:
        """The stage itself, in this process."""
        return self.build(**self.arguments)


Runner = Callable[[Iterable[Any], list[PipelineStage]], Iterator[Any]]
"""Sends items through stages and yields the results; jobs use `run_on_ray`."""


class CrashedTooOften(RuntimeError):
    """An item killed `MAX_ATTEMPTS` workers in a stage that cannot reject it."""


def run_on_ray(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """Stream `items` through `stages` as Ray Data actor pools; yields results in order of completion.

    Memory is bounded by Ray Data's backpressure: a stage waits while the next one is full. Very many items
    are taken window by window, each when the one before it is done; actors start anew with each.
    """
    left, size = iter(items), window_items(stage.pool for stage in stages)
    # Ray Data keeps a record of each block until its execution ends, and takes all of its input at once.
    while window := list(itertools.islice(left, size)):
        yield from _run_window(window, stages)


def _run_window(items: Sequence[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """Send items through the stages in one execution of Ray Data."""
    # Pickled here: Ray Data would turn dataclasses and arrays into Arrow columns.
    rows = [{"item": pickle.dumps(item), "key": str(number)} for number, item in enumerate(items)]
    context = ray.data.DataContext.get_current()
    # Every unit is a block of its own: the next stage, and the commit, need not wait for its neighbours.
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.enable_progress_bars = False
    attempts = on_driver_node(_AttemptCounter).remote()
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for number, stage in enumerate(stages):
        # The first stage has one task an item; later ones may have more.
        strategy = actor_strategy(stage.pool, tasks=len(rows) if number == 0 else None)
        dataset = dataset.map_batches(
            _StageActor,
            fn_constructor_args=(number, stage, attempts),
            batch_size=1,
            compute=strategy,
            num_cpus=stage.pool.cpus,
            num_gpus=stage.pool.gpus,
            label_selector=stage.pool.labels or None,
        )
    for row in dataset.iter_rows():
        yield pickle.loads(row["item"])


def actor_strategy(pool: Pool, *, tasks: int | None) -> ray.data.ActorPoolStrategy:
    """The sizes of a pool in Ray's terms, of at most as many actors as there are tasks, if that is known."""
    least, most = (size if tasks is None else min(size, tasks) for size in (pool.actors, pool.most_actors))
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most)


def on_driver_node(actor: type) -> Any:  # noqa: ANN401 - an actor class
    """An actor class bound to the driver's node, without CPUs.

    By default Ray places an actor without resources on any node; if that node is removed, the job ends.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here)


class _AttemptCounter:
    """Counts the attempts of each stage at each item; an actor, so it outlives the workers that die."""

    def __init__(self) -> None:
        self.attempts: dict[tuple[int, str], int] = {}

    def begin(self, stage: int, key: str) -> int:
        self.attempts[stage, key] = self.attempts.get((stage, key), 0) + 1
        return self.attempts[stage, key]


class _StageActor:
    """A stage inside an actor: bytes in, bytes out."""

    def __init__(self, number: int, stage: PipelineStage, attempts: Any) -> None:  # noqa: ANN401 - an actor handle
        self.number = number
        self.stage = stage
        self.attempts = attempts
        self.clock = StageClock(stage.build.__name__)
        self.work = stage.create()
        self.clock.wait()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        key = str(batch["key"][0])
        # Counted before the work: Ray repeats the task of a worker that died; only this count survives it.
        attempt = ray.get(self.attempts.begin.remote(self.number, key))
        results = map(pickle.dumps, self._results(batch["item"][0], attempt))
        for index in itertools.count():
            # Between two results the next stage's backpressure may suspend the actor: that is not busy time.
            with self.clock.busy():
                result = next(results, None)
            if result is None:
                return
            yield {"item": [result], "key": [f"{key}.{index}"]}

    def _results(self, pickled: bytes, attempt: int) -> Iterator[Any]:
        item = pickle.loads(pickled)
        if attempt > MAX_ATTEMPTS:
            if self.stage.give_up is None:
                name = type(self.work).__name__
                raise CrashedTooOften(f"{name} killed its worker {MAX_ATTEMPTS} times on {item!r:.200}")
            yield self.stage.give_up(item)
            return
        # A stage that can isolate its rows, at some cost, does so once the item has killed a worker.
        work = getattr(self.work, "isolated", self.work) if attempt > 1 else self.work
        result = work(item)
        yield from result if isinstance(result, Iterator) else [result]
