"""A latency table whose times are known: so many milliseconds of each kind of part."""

from __future__ import annotations

from snapfusion.evolution.latency import LatencyTable, MeasurementSetup, PartLatency, reachable_parts
from snapfusion.evolution.parts import dimensions_of
from snapfusion.evolution.stopwatch import Timing
from snapfusion.models.architecture import Architecture

MS = {"resnet": 2.0, "attention": 4.0, "shortcut": 0.5, "join": 0.0, "downsampler": 1.0, "upsampler": 1.0}


def known_table(architecture: Architecture, *, tokens: int = 24, device: str = "a test") -> LatencyTable:
    """A table of the architecture's parts and of all it can become."""

    def times(kind: str) -> Timing:
        return Timing(median_ms=MS.get(kind, 0.0), low_ms=0.0, high_ms=9.0, turns=3)

    return LatencyTable(
        setup=MeasurementSetup(device=device, runtime="torch", precision="float32", threads=1),
        date="2026-11-21",
        dimensions=dimensions_of(architecture, batch=2, tokens=tokens),
        parts=tuple(PartLatency(part=part, times=times(part.kind)) for part in reachable_parts(architecture)),
    )
