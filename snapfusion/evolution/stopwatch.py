"""Fair timing: the candidates are warmed up, then run in turns on the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from pydantic import NonNegativeFloat, PositiveInt

from snapfusion.settings import Settings

MIN_SECONDS = 0.002
"""A faster candidate is run several times per turn, because of the resolution of the clock."""


class Timing(Settings):
    """Duration of a run.

    Attributes:
        median_ms: of all turns, in milliseconds.
        low_ms: first quartile.
        high_ms: third quartile.
        turns: number of turns.
    """

    median_ms: NonNegativeFloat
    low_ms: NonNegativeFloat
    high_ms: NonNegativeFloat
    turns: PositiveInt


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, Timing]:
    """Time `runs`, each of which returns when its work is done, by turns: all of them once, then again.

    Args:
        runs: candidates by name.
        turns: of each candidate, at least 2, after a warm-up.
        on_turn: called with the number of completed turns.

    Raises:
        ValueError: for fewer than two turns, which have no quartiles.
    """
    if turns < 2:
        raise ValueError(f"turns is {turns}; at least 2 are needed for quartiles")
    repeats = {name: _repeats(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # In turns, so that a change of clock speed or load during the measurement affects all candidates.
    for turn in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
        on_turn(turn + 1)
    return {name: timing_of(durations) for name, durations in seconds.items()}


def _repeats(run: Callable[[], object]) -> int:
    run()  # allocates buffers and compiles kernels
    start = time.perf_counter()
    run()
    return max(1, int(MIN_SECONDS / max(time.perf_counter() - start, 1e-9)))


def timing_of(seconds: Sequence[float]) -> Timing:
    """Summarize the seconds of two turns or more."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median_ms=1000.0 * median, low_ms=1000.0 * low, high_ms=1000.0 * high, turns=len(seconds))
