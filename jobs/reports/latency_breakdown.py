"""Latency of a UNet by kind of block (SnapFusion Fig. 2, Table 3), from a file of `jobs.measure_latency`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.reports.charts import BarChart, Bars, standalone_svg
from pipelines.storage.objects import replace_object

if TYPE_CHECKING:
    from snapfusion.models.architecture import Architecture

_KINDS = {"attention": "cross-attention", "resnet": "ResNet"}
_MEASURES = {"ms": ("latency", "ms", 1.0), "parameters": ("parameters", "millions", 1e6)}


@dataclass(frozen=True, kw_only=True)
class WholeUNet:
    """Latency and size of a whole UNet.

    Attributes:
        name: "origin" or "table-3".
        measured_ms: median time of a pass.
        predicted_ms: sum of the times of its parts.
        error: of the prediction, as a share of the measured time.
        parameters: their number.
        macs: multiply-accumulates of a pass for one latent.
        turns: number of measurements.
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
    """The content of one latency file.

    Attributes:
        device: the machine's own name.
        runtime: runtime, precision and threads, in words.
        date: of the measurement.
        batch: latents in a pass.
        unets: measured as a whole, the original first.
        charts: Fig. 2.
        disturbed: whether the parts did not add up to a whole UNet, so that no time is a result.
        rows: of Table 3: stage, side, kind, channels, number of blocks in each UNet.
    """

    device: str
    runtime: str
    date: str
    batch: int
    unets: tuple[WholeUNet, ...]
    charts: tuple[BarChart, ...]
    disturbed: bool
    rows: tuple[tuple[Any, ...], ...]


def breakdown_of(record: Mapping[str, Any]) -> LatencyBreakdown:
    """The breakdown of a latency file's content."""
    # Here and below, because they import torch, which a page of kept parts does without.
    from snapfusion.evolution.latency import LatencyTable
    from snapfusion.models.cost import block_count_table

    table = LatencyTable.parse(record["table"])
    setup = table.setup
    threads = f", {setup.threads} thread{'s' * (setup.threads > 1)}" if setup.threads else ""
    return LatencyBreakdown(
        device=setup.device,
        runtime=f"{setup.runtime}, {setup.precision}{threads}",
        date=table.date,
        batch=table.dimensions.batch,
        unets=tuple(
            WholeUNet(
                name=name,
                measured_ms=unet["measured"]["median_ms"],
                turns=unet["measured"]["turns"],
                **{key: unet[key] for key in ("predicted_ms", "error", "parameters", "macs")},
            )
            for name, unet in record["unets"].items()
        ),
        charts=tuple(breakdown_charts(record).values()),
        # Older files do not say.
        disturbed=bool(record.get("disturbed")),
        rows=tuple(block_count_table(*_architectures(record).values())),
    )


def breakdown_charts(record: Mapping[str, Any]) -> dict[str, BarChart]:
    """SnapFusion Fig. 2: latency and parameters of both kinds of block; all UNets but the last are paler."""
    from snapfusion.evolution.latency import LatencyTable, latency_by_kind

    table = LatencyTable.parse(record["table"])
    rows = {name: latency_by_kind(table, shape) for name, shape in _architectures(record).items()}
    stages = list(dict.fromkeys(row["stage"] for row in next(iter(rows.values()))))
    setup = table.setup
    # A page may show several runtimes: the title distinguishes their charts.
    where = f"{setup.runtime} in {setup.precision} on {setup.device}"
    charts = {}
    for key, (measure, unit, scale) in _MEASURES.items():
        bars = tuple(
            Bars(
                name=f"{kind_name}, {name}",
                values=[row[key] / scale for row in rows[name] if row["kind"] == kind],
                color=color,
                faint=name != list(rows)[-1],
            )
            for color, (kind, kind_name) in enumerate(_KINDS.items(), start=1)
            for name in rows
        )
        title = f"{measure.capitalize()} of the blocks, {where}"
        charts[key] = BarChart(title=title, y_label=f"{measure} ({unit})", categories=stages, bars=bars)
    return charts


def with_charts(record: Mapping[str, Any], *, url: str) -> Mapping[str, Any]:
    """The record of the latency file at `url`; writes Fig. 2 beside it, if the record has whole UNets."""
    for kind, chart in (breakdown_charts(record) if record["unets"] else {}).items():
        replace_object(f"{url.removesuffix('.json')}-{kind}.svg", standalone_svg(chart))
    return record


def _architectures(record: Mapping[str, Any]) -> dict[str, Architecture]:
    from snapfusion.models.architecture import Architecture

    return {name: Architecture.parse(unet["architecture"]) for name, unet in record["unets"].items()}
