"""The latency lookup table T: the latency of each part of a UNet on a device. SnapFusion Sec. 2.2, Alg. 1.

The latency of a UNet is the sum over its parts. That of a block is the difference without it: a removed
ResNet block may leave its shortcut.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, Field

from snapfusion.evolution.parts import Part, UNetDimensions, dimensions_of, parts_of
from snapfusion.evolution.settings import Precision
from snapfusion.evolution.stopwatch import Timing
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import costs_of, paper_stages
from snapfusion.settings import Settings, differences


class LatencyError(ValueError):
    """A latency table that lacks a part, or that was measured for something else."""


class PartLatency(Settings):
    """The measured latency of a part."""

    part: Part
    times: Timing


class MeasurementSetup(Settings):
    """Hardware and software of a measurement.

    Attributes:
        device: name of the CPU or GPU, as the machine reports it.
        runtime: "torch", "torch-compiled", "executorch-xnnpack", or another name in a table from elsewhere.
        precision: of the networks.
        threads: of the CPU; 0 on another device.
    """

    device: str
    runtime: str
    precision: Precision
    threads: int


class LatencyTable(Settings):
    """A latency table, measured here or read from a file.

    Attributes:
        version: of the file format.
        setup: hardware and software ("setting" in the file).
        date: of the measurement, as YYYY-MM-DD.
        dimensions: shared by all parts ("frame" in the file).
        parts: the measured parts.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    version: Literal[1] = 1
    setup: MeasurementSetup = Field(alias="setting")
    date: str
    dimensions: UNetDimensions = Field(alias="frame")
    parts: tuple[PartLatency, ...]

    @cached_property
    def _medians(self) -> dict[Part, float]:
        return {entry.part: entry.times.median_ms for entry in self.parts}

    def part_ms(self, part: Part) -> float:
        """Return the median latency of a part, in milliseconds.

        Raises:
            LatencyError: if it was not measured.
        """
        if part not in self._medians:
            raise LatencyError(f"the latency table of {self.setup.device} has no {part}; measure it again")
        return self._medians[part]

    def kind_ms(self, architecture: Architecture) -> dict[tuple[str, str], float]:
        """Sum the milliseconds of each stage and kind of part.

        Raises:
            LatencyError: if a part was not measured, or the table was measured for other dimensions.
        """
        given = dimensions_of(architecture, batch=self.dimensions.batch, tokens=self.dimensions.tokens)
        _raise_on_difference(differences(self.dimensions.to_values(), given.to_values()))
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for stage, part in parts_of(architecture):
            sums[stage, part.kind] += self.part_ms(part)
        return sums

    def stage_ms(self, architecture: Architecture) -> dict[str, float]:
        """Sum the milliseconds of each stage, and of "ends"; errors as of `kind_ms`. SnapFusion Fig. 2."""
        sums: dict[str, float] = defaultdict(float)
        for (stage, _), ms in self.kind_ms(architecture).items():
            sums[stage] += ms
        return sums

    def predict_ms(self, architecture: Architecture) -> float:
        """Predict the milliseconds of the whole UNet; errors as of `kind_ms`."""
        return sum(self.stage_ms(architecture).values())

    def block_ms(self, architecture: Architecture, name: str) -> float:
        """Delta Latency of SnapFusion Alg. 1: the milliseconds saved without the named block.

        Raises:
            LatencyError: as of `kind_ms`.
            ArchitectureError: if there is no such block.
        """
        return self.predict_ms(architecture) - self.predict_ms(architecture.without(name))

    def check_setup(self, setup: MeasurementSetup) -> None:
        """Check that the table was measured with the given setup.

        Raises:
            LatencyError: naming the differences.
        """
        _raise_on_difference(differences(self.setup.to_values(), setup.to_values()))


def _raise_on_difference(found: Iterable[str]) -> None:
    if differing := list(found):
        raise LatencyError(f"the latency table is of something else: {'; '.join(differing[:3])}")


def reachable_parts(*architectures: Architecture) -> list[Part]:
    """List the distinct parts of the architectures, and of all that evolution can make of them.

    Those are shortcuts of removed blocks; a copied block is the same part as its origin.
    """
    found: dict[Part, None] = {}
    for architecture in architectures:
        for _, part in parts_of(architecture):
            found[part] = None
            if part.kind == "resnet" and part.in_channels != part.out_channels:
                found[part.model_copy(update={"kind": "shortcut"})] = None
    return list(found)


def latency_by_kind(table: LatencyTable, architecture: Architecture) -> list[dict[str, Any]]:
    """Bars of SnapFusion Fig. 2: stage as in Table 3, kind, blocks, milliseconds, parameters."""
    ms = table.kind_ms(architecture)
    costs = costs_of(architecture, tokens=table.dimensions.tokens).blocks
    rows = []
    for name, stages in paper_stages(architecture).items():
        for kind in ("attention", "resnet"):
            blocks = [block for block in architecture.blocks if block.stage in stages and block.kind == kind]
            rows.append(
                {
                    "stage": name,
                    "kind": kind,
                    "blocks": len(blocks),
                    "ms": sum(ms.get((stage, kind), 0.0) for stage in stages),
                    "parameters": sum(costs[block.name].parameters for block in blocks),
                }
            )
    return rows


def latency_by_stage(table: LatencyTable, architecture: Architecture) -> list[dict[str, Any]]:
    """Rows of SnapFusion Fig. 2: stage, milliseconds, and share of the total."""
    sums = table.stage_ms(architecture)
    total = sum(sums.values())
    return [{"stage": stage, "ms": ms, "share": ms / total} for stage, ms in sums.items()]
