"""Architectures that lost blocks at random: what an evolved one has to be better than."""

from __future__ import annotations

from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.search import check_objective
from snapfusion.models.architecture import Architecture
from snapfusion.noise import noise_key, uniform

_MAX_ATTEMPTS = 1000


def random_architecture(
    origin: Architecture, *, table: LatencyTable, low_ms: float, high_ms: float, seed: int
) -> Architecture:
    """`origin` without blocks that were drawn one after the other until a pass takes at most `high_ms`.

    Where the last one makes it faster than `low_ms`, another draw is taken.

    Args:
        origin: what loses them.
        table: by which time is told.
        low_ms: least milliseconds of a pass.
        high_ms: most.
        seed: of the draws.

    Raises:
        EvolutionError: if `origin` cannot become so fast.
        ValueError: if none of a thousand draws was between the two.
        LatencyError: if the table does not hold the architecture's parts.
    """
    check_objective(origin, table=table, objective_ms=high_ms)
    for attempt in range(_MAX_ATTEMPTS):
        found = _without_random_blocks(origin, table=table, high_ms=high_ms, seed=seed, attempt=attempt)
        if table.predict_ms(found) >= low_ms:
            return found
    raise ValueError(f"{_MAX_ATTEMPTS} architectures were drawn, and none takes {low_ms:g} to {high_ms:g} ms")


def _without_random_blocks(
    origin: Architecture, *, table: LatencyTable, high_ms: float, seed: int, attempt: int
) -> Architecture:
    names = [block.name for block in origin.blocks]
    draws = uniform(noise_key("chance", seed, attempt), len(names))
    architecture = origin
    for _, name in sorted(zip(draws.tolist(), names, strict=True)):
        if table.predict_ms(architecture) <= high_ms:
            break
        architecture = architecture.without(name)
    return architecture
