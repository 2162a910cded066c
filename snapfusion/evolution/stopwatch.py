"""Fair timing: everything that is compared is warmed, and then takes turns on the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from pydantic import NonNegativeFloat, PositiveInt

from snapfusion.settings import Settings

_MIN_SECONDS = 0.002
"""What takes less is run several times in a turn, or the clock would decide."""


class Timing(Settings):
    """How long something takes.

    Attributes:
        median_ms: of all turns, in milliseconds.
        low_ms: first quartile.
        high_ms: third quartile.
        turns: how many.
    """

    median_ms: NonNegativeFloat
    low_ms: NonNegativeFloat
    high_ms: NonNegativeFloat
    turns: PositiveInt


def time_in_turns(
    runs: Mapping[str, Callable[[], None]],
    *,
    turns: int,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, Timing]:
    """Time `runs`, each of which returns when its work is done; one after the other, then again.

    Args:
        runs: what is timed, by name.
        turns: of each, 2 at least; the first of all is not counted.
        on_turn: told of the number of turns that are over.

    Raises:
        ValueError: for fewer than two turns, which have no spread.
    """
    if turns < 2:
        raise ValueError(f"{turns} turns have no spread; at least 2 are needed")
    repeats = {name: _repeats(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
        on_turn(turn + 1)
    return {name: _times(taken) for name, taken in seconds.items()}


def _repeats(run: Callable[[], None]) -> int:
    run()  # what is made once, such as buffers and compiled kernels
    began = time.perf_counter()
    run()
    return max(1, int(_MIN_SECONDS / max(time.perf_counter() - began, 1e-9)))


def _times(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median_ms=1000.0 * median, low_ms=1000.0 * low, high_ms=1000.0 * high, turns=len(seconds))
