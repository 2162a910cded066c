"""What a UNet's blocks take: SnapFusion Fig. 2 and Table 3, of a file of `jobs.measure_latency`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.reports.charts import BarChart, Bars
from snapfusion.evolution.latency import LatencyTable, latency_by_kind
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import block_count_table

_KINDS = {"attention": "cross-attention", "resnet": "ResNet"}
_MEASURES = {"ms": ("latency", "ms", 1.0), "parameters": ("parameters", "millions", 1e6)}


@dataclass(frozen=True, kw_only=True)
class WholeUNet:
    """A UNet as a whole.

    Attributes:
        name: "origin" or "table-3".
        measured_ms: of a pass.
        predicted_ms: the sum of its parts.
        error: of the prediction, as a share of what was measured.
        parameters: numbers that are learned.
        macs: multiply-accumulates of a pass for one latent.
        turns: behind the measurement.
    """

    name: str
    measured_ms: float
    predicted_ms: float
    error: float
    parameters: int
    macs: int
    turns: int


@dataclass(frozen=True, kw_only=True)
class LatencyBreakdown:
    """What one latency file says.

    Attributes:
        device: the machine's own name.
        how: runtime, precision and threads, in words.
        date: when.
        batch: latents in a pass.
        unets: measured as a whole, the origin first.
        charts: Fig. 2.
        rows: of Table 3: stage, side, kind, channels, blocks of each UNet.
    """

    device: str
    how: str
    date: str
    batch: int
    unets: tuple[WholeUNet, ...]
    charts: tuple[BarChart, ...]
    rows: tuple[tuple[Any, ...], ...]


def breakdown_of(told: Mapping[str, Any]) -> LatencyBreakdown:
    """The content of a latency file, as a page shows it."""
    table = LatencyTable.parse(told["table"])
    setup = table.setup
    threads = f", {setup.threads} thread{'s' * (setup.threads > 1)}" if setup.threads else ""
    return LatencyBreakdown(
        device=setup.device,
        how=f"{setup.runtime}, {setup.precision}{threads}",
        date=table.date,
        batch=table.dimensions.batch,
        unets=tuple(
            WholeUNet(
                name=name,
                measured_ms=unet["measured"]["median_ms"],
                predicted_ms=unet["predicted_ms"],
                error=unet["error"],
                parameters=unet["parameters"],
                macs=unet["macs"],
                turns=unet["measured"]["turns"],
            )
            for name, unet in told["unets"].items()
        ),
        charts=tuple(breakdown_charts(told).values()),
        rows=tuple(block_count_table(*_architectures(told).values())),
    )


def breakdown_charts(told: Mapping[str, Any]) -> dict[str, BarChart]:
    """SnapFusion Fig. 2: latency and parameters of both kinds of block; the origin paler than the other."""
    table = LatencyTable.parse(told["table"])
    rows = {name: latency_by_kind(table, shape) for name, shape in _architectures(told).items()}
    stages = list(dict.fromkeys(row["stage"] for row in next(iter(rows.values()))))
    setup = table.setup
    charts = {}
    for key, (measure, unit, scale) in _MEASURES.items():
        bars = tuple(
            Bars(
                name=f"{words}, {name}",
                values=[row[key] / scale for row in rows[name] if row["kind"] == kind],
                color=1 + number,
                faint=name != list(rows)[-1],
            )
            for number, (kind, words) in enumerate(_KINDS.items())
            for name in rows
        )
        # Two runtimes on one page have each their chart, told apart by its title.
        where = f"{setup.runtime} in {setup.precision} on {setup.device}"
        title = f"{measure.capitalize()} of the blocks, {where}"
        charts[key] = BarChart(title=title, y_label=f"{measure} ({unit})", categories=stages, bars=bars)
    return charts


def _architectures(told: Mapping[str, Any]) -> dict[str, Architecture]:
    return {name: Architecture.parse(unet["architecture"]) for name, unet in told["unets"].items()}
