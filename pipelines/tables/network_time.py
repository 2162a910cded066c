"""The time in which networks computed, of the time between their first and last units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class UnitSpan:
    """When a worker's network computed a unit, in seconds of that worker's own monotonic clock.

    Attributes:
        worker: a name that no other worker has.
        began: when its network began with the unit.
        ended: when its outputs were in the memory of the CPU.
    """

    worker: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """The length."""
        return self.ended - self.began


@dataclass(frozen=True)
class _WorkerTime:
    """Of one worker: its first beginning, its last end, the seconds of its units, and their number."""

    first: float
    last: float
    computing: float
    units: int

    def with_span(self, span: UnitSpan) -> _WorkerTime:
        return _WorkerTime(
            first=min(self.first, span.began),
            last=max(self.last, span.ended),
            computing=self.computing + span.seconds,
            units=self.units + 1,
        )


@dataclass(frozen=True)
class NetworkTime:
    """What the workers of a table's network did from their first units to their last, in any order."""

    workers: Mapping[str, _WorkerTime] = field(default_factory=dict)

    def with_span(self, span: UnitSpan | None) -> NetworkTime:
        """The time with one more unit; None is a unit whose time is not known, and changes nothing."""
        if span is None:
            return self
        before = self.workers.get(span.worker, _WorkerTime(span.began, span.ended, 0.0, 0))
        return NetworkTime({**self.workers, span.worker: before.with_span(span)})

    def __add__(self, other: NetworkTime) -> NetworkTime:
        """The time of two tables, whose workers are different ones."""
        return NetworkTime({**self.workers, **other.workers})

    @property
    def busy_share(self) -> float | None:
        """Share of the time between the first and the last unit of each worker in which it computed: 0 .. 1.

        The rest is waiting for inputs, for the next stage, and for Ray. None if no worker made two units.
        """
        # One unit has no time between; it would count as all computing.
        counted = [worker for worker in self.workers.values() if worker.units > 1]
        whole = sum(worker.last - worker.first for worker in counted)
        return sum(worker.computing for worker in counted) / whole if whole > 0 else None
