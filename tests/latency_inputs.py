"""Latency tables with known latencies."""

from collections.abc import Callable

from snapfusion.evolution.latency import LatencyTable, MeasurementSetup, PartLatency, reachable_parts
from snapfusion.evolution.parts import Part, dimensions_of
from snapfusion.evolution.stopwatch import Timing
from snapfusion.models.architecture import Architecture

MS = {"resnet": 2.0, "attention": 4.0, "shortcut": 0.5, "join": 0.0, "downsampler": 1.0, "upsampler": 1.0}


def known_table(
    architecture: Architecture,
    *,
    tokens: int = 24,
    device: str = "a test",
    ms: Callable[[Part], float] = lambda part: MS.get(part.kind, 0.0),
) -> LatencyTable:
    """A table of all parts reachable from the architecture, each with the latency `ms(part)`."""
    return LatencyTable(
        setup=MeasurementSetup(device=device, runtime="torch", precision="float32", threads=1),
        date="2026-11-21",
        dimensions=dimensions_of(architecture, batch=2, tokens=tokens),
        parts=tuple(
            PartLatency(part=part, times=Timing(median_ms=ms(part), low_ms=0.0, high_ms=9.0, turns=3))
            for part in reachable_parts(architecture)
        ),
    )
