"""The latency lookup table T: what each part of a UNet takes on a device. SnapFusion Sec. 2.2, Alg. 1.

A UNet's time is the sum of its parts'. What a block is worth in time is that sum without it: of a removed
ResNet block its shortcut may remain.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

from snapfusion.evolution.parts import Part, UNetDimensions, dimensions_of, parts_of
from snapfusion.evolution.settings import Precision
from snapfusion.evolution.stopwatch import Timing
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import costs_of, paper_stages
from snapfusion.settings import Settings, differences


class LatencyError(ValueError):
    """A table that does not hold what is asked of it, or is of something else; the message says what."""


class PartLatency(Settings):
    """A part, and how long it takes."""

    part: Part
    times: Timing


class MeasurementSetup(Settings):
    """Where and how a table was measured.

    Attributes:
        device: the machine's own name for it.
        runtime: "torch", "torch-compiled", "executorch-xnnpack", or what else computed it.
        precision: of the networks.
        threads: of the CPU; 0 where it does not compute.
    """

    device: str
    runtime: str
    precision: Precision
    threads: int


class LatencyTable(Settings):
    """A measurement, or a file of one made elsewhere.

    Attributes:
        version: of this form.
        setting: where and how.
        date: when, as YYYY-MM-DD.
        frame: what the parts have in common.
        parts: each once.
    """

    version: Literal[1] = 1
    setting: MeasurementSetup
    date: str
    frame: UNetDimensions
    parts: tuple[PartLatency, ...]

    @cached_property
    def _of(self) -> dict[Part, float]:
        return {entry.part: entry.times.median_ms for entry in self.parts}

    def part_ms(self, part: Part) -> float:
        """The median time of a part, in milliseconds.

        Raises:
            LatencyError: if it was not measured.
        """
        if part not in self._of:
            raise LatencyError(f"the latency table of {self.setting.device} has no {part}; measure it again")
        return self._of[part]

    def stage_ms(self, architecture: Architecture) -> dict[str, float]:
        """Milliseconds of each stage, and of the "ends". SnapFusion Fig. 2.

        Raises:
            LatencyError: if a part was not measured, or parts of another frame were; names what differs.
        """
        sums: dict[str, float] = {}
        for (stage, _), ms in self.kind_ms(architecture).items():
            sums[stage] = sums.get(stage, 0.0) + ms
        return sums

    def kind_ms(self, architecture: Architecture) -> dict[tuple[str, str], float]:
        """Milliseconds of each stage's parts of each kind.

        Raises:
            LatencyError: as `stage_ms`.
        """
        self._check(architecture)
        sums: dict[tuple[str, str], float] = {}
        for stage, part in parts_of(architecture):
            key = (stage, part.kind)
            sums[key] = sums.get(key, 0.0) + self.part_ms(part)
        return sums

    def predict_ms(self, architecture: Architecture) -> float:
        """Milliseconds of the whole UNet.

        Raises:
            LatencyError: as `stage_ms`.
        """
        return sum(self.stage_ms(architecture).values())

    def block_ms(self, architecture: Architecture, name: str) -> float:
        """Delta Latency of SnapFusion Alg. 1: what the UNet takes less without the block of that name.

        Raises:
            LatencyError: as `stage_ms`.
            ArchitectureError: if there is no such block.
        """
        return self.predict_ms(architecture) - self.predict_ms(architecture.without(name))

    def check_setting(self, wanted: MeasurementSetup) -> None:
        """Refuse a table of another device, runtime, precision or number of threads.

        Raises:
            LatencyError: names what differs.
        """
        _raise_on_difference(differences(self.setting.to_values(), wanted.to_values()))

    def _check(self, architecture: Architecture) -> None:
        wanted = dimensions_of(architecture, batch=self.frame.batch, tokens=self.frame.tokens)
        _raise_on_difference(differences(self.frame.to_values(), wanted.to_values()))


def _raise_on_difference(differing: Iterable[str]) -> None:
    if found := list(differing):
        raise LatencyError(f"the latency table is of something else: {'; '.join(found[:3])}")


def reachable_parts(*architectures: Architecture) -> list[Part]:
    """Each different part of the architectures and of all that have some blocks less, in a fixed order.

    So a table of them predicts whatever evolution can reach from there: a copy has its origin's form.
    """
    found: dict[Part, None] = {}
    for architecture in architectures:
        for _, part in parts_of(architecture):
            found[part] = None
            if part.kind == "resnet" and part.given != part.wanted:
                found[part.model_copy(update={"kind": "shortcut"})] = None
    return list(found)


def latency_by_kind(table: LatencyTable, architecture: Architecture) -> list[dict[str, Any]]:
    """Bars of SnapFusion Fig. 2: stage as Table 3 names it, kind, blocks, milliseconds, parameters."""
    ms, costs = table.kind_ms(architecture), costs_of(architecture, tokens=table.frame.tokens).blocks
    rows = []
    for name, stages in paper_stages(architecture).items():
        for kind in ("attention", "resnet"):
            blocks = [
                block.name for block in architecture.blocks if block.stage in stages and block.kind == kind
            ]
            rows.append(
                {
                    "stage": name,
                    "kind": kind,
                    "blocks": len(blocks),
                    "ms": sum(ms.get((stage, kind), 0.0) for stage in stages),
                    "parameters": sum(costs[block].parameters for block in blocks),
                }
            )
    return rows


def latency_by_stage(table: LatencyTable, architecture: Architecture) -> list[dict[str, Any]]:
    """Rows of SnapFusion Fig. 2: stage, milliseconds, and the share of the whole."""
    sums = table.stage_ms(architecture)
    whole = sum(sums.values())
    return [{"stage": stage, "ms": ms, "share": ms / whole} for stage, ms in sums.items()]
