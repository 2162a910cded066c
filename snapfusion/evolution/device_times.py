"""Times of a UNet's parts that another device measured, and the latency table that they make. Sec. 2.2.

A device is sent programs (`snapfusion.evolution.programs`) with a list of them, runs each in turns with the
others, and returns the milliseconds. What was timed travels with the times, so that those of another
architecture are refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from snapfusion.evolution.latency import (
    LatencyError,
    LatencyTable,
    MeasurementSetup,
    PartLatency,
    reachable_parts,
)
from snapfusion.evolution.parts import Part, UNetDimensions
from snapfusion.evolution.settings import DEVICE_PRECISION, DeviceRuntime
from snapfusion.evolution.stopwatch import Timing, timing_of
from snapfusion.models.architecture import Architecture
from snapfusion.settings import Settings, differences

_MAX_NAMES = 3
"""Names of programs in an error."""

Milliseconds = Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
"""Of one pass in each turn."""


class TimedUNets(Settings):
    """The UNets whose parts are timed.

    Attributes:
        dimensions: shared by all parts.
        unets: architectures by name, all of these dimensions.
    """

    dimensions: UNetDimensions
    unets: dict[str, Architecture]

    def parts(self) -> dict[str, Part]:
        """The parts that are timed, by the names of their programs."""
        return {program_name(part): part for part in reachable_parts(*self.unets.values())}

    def whole(self) -> dict[str, Architecture]:
        """The whole UNets, which may be timed, too, by the names of their programs."""
        return {f"unet-{name}": architecture for name, architecture in self.unets.items()}


class DeviceTimes(Settings):
    """The file that a device returns.

    Attributes:
        version: of the file format.
        of: what was timed, as the job list states it.
        device: name of the device and its system.
        runtime: of the programs.
        threads: of the CPU; 0 where the runtime chooses.
        date: of the measurement, as YYYY-MM-DD.
        times_ms: by the names of the programs; those of whole UNets may be missing.
    """

    version: Literal[1] = 1
    of: TimedUNets
    device: Annotated[str, Field(min_length=1, max_length=100)]
    runtime: DeviceRuntime
    threads: NonNegativeInt
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    times_ms: dict[str, Milliseconds]

    def check(self, expected: TimedUNets) -> None:
        """Check that these are times of the expected UNets, and of all their parts.

        Raises:
            LatencyError: naming what differs, is missing or is unknown.
        """
        if differing := list(differences(self.of.to_values(), expected.to_values())):
            raise LatencyError(
                f"the times are of other UNets than this run's: {'; '.join(differing[:_MAX_NAMES])}; "
                "export the programs of this run's model, and time those"
            )
        missing = [name for name in expected.parts() if name not in self.times_ms]
        unknown = sorted(self.times_ms.keys() - expected.parts().keys() - expected.whole().keys())
        for problem, names in (("lack", missing), ("have an unknown", unknown)):
            if names:
                others = " and others" * (len(names) > _MAX_NAMES)
                raise LatencyError(
                    f"the times {problem} {', '.join(names[:_MAX_NAMES])}{others}: one list of milliseconds "
                    "for each program of the job list is accepted"
                )

    def table(self) -> LatencyTable:
        """The latency table of the device; call `check` first."""
        setup = MeasurementSetup(
            device=self.device,
            runtime=self.runtime,
            precision=DEVICE_PRECISION[self.runtime],
            threads=self.threads,
        )
        return LatencyTable(
            setup=setup,
            date=self.date,
            dimensions=self.of.dimensions,
            parts=tuple(
                PartLatency(part=part, times=self._timing(name)) for name, part in self.of.parts().items()
            ),
        )

    def whole_unets(self) -> dict[str, Timing]:
        """The times of whole UNets by the names of their architectures, as far as they were measured."""
        programs = zip(self.of.unets, self.of.whole(), strict=True)
        return {name: self._timing(program) for name, program in programs if program in self.times_ms}

    def _timing(self, name: str) -> Timing:
        return timing_of([ms / 1000.0 for ms in self.times_ms[name]])


def program_name(part: Part) -> str:
    """A part's name as a file: its kind, side of the latent, input and output channels, and heads."""
    heads = f"-{part.heads}" if part.heads else ""
    return f"{part.kind}-{part.side}-{part.in_channels}-{part.out_channels}{heads}"
