"""Architectures with random blocks removed, the baseline of an evolved one."""

from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.search import check_objective
from snapfusion.models.architecture import Architecture
from snapfusion.noise import noise_key, uniform

_MAX_ATTEMPTS = 1000


def random_architecture(
    origin: Architecture, *, table: LatencyTable, low_ms: float, high_ms: float, seed: int
) -> Architecture:
    """Remove random blocks of `origin` one by one until a pass takes at most `high_ms`.

    Starts over if the last one makes it faster than `low_ms`.

    Args:
        origin: the architecture to start from.
        table: predicts the latency.
        low_ms: minimum milliseconds of a pass.
        high_ms: maximum milliseconds of a pass.
        seed: of the draws.

    Raises:
        EvolutionError: if `origin` cannot become that fast.
        ValueError: if no attempt of a thousand is in the range.
        LatencyError: if the table lacks a part of the architecture.
    """
    check_objective(origin, table=table, objective_ms=high_ms)
    for attempt in range(_MAX_ATTEMPTS):
        found = _without_random_blocks(origin, table=table, high_ms=high_ms, seed=seed, attempt=attempt)
        if table.predict_ms(found) >= low_ms:
            return found
    raise ValueError(f"none of {_MAX_ATTEMPTS} random architectures takes {low_ms:g} to {high_ms:g} ms")


def _without_random_blocks(
    origin: Architecture, *, table: LatencyTable, high_ms: float, seed: int, attempt: int
) -> Architecture:
    names = [block.name for block in origin.blocks]
    # "chance" is part of the key, so it stays as it was in published runs.
    draws = uniform(noise_key("chance", seed, attempt), len(names))
    architecture = origin
    for _, name in sorted(zip(draws.tolist(), names, strict=True)):
        if table.predict_ms(architecture) <= high_ms:
            break
        architecture = architecture.without(name)
    return architecture
