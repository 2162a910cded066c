"""Latency of a UNet, part by part. SnapFusion Sec. 2.2, Alg. 1.

A UNet's parts add up to the whole (Alg. 1). Where they do not, the machine was busy with something else while
one of both was timed: such a measurement is taken once more, and marked if it does not add up again.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import backend_of, setting_of, unet_benchmark
from jobs.runtime.logs import logger
from snapfusion.evolution.latency import LatencyTable, PartLatency, latency_by_stage, reachable_parts
from snapfusion.evolution.parts import dimensions_of, inputs_of, module_of
from snapfusion.evolution.stopwatch import Timing, time_in_turns
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import costs_of

MAX_ERROR = 0.25
"""The largest error of a prediction, as a share of the measured time, of an undisturbed measurement."""

_WHOLE_PREFIX = "whole "


def measure_latency(
    settings: LatencySettings,
    *,
    architectures: Mapping[str, Architecture],
    tokens: int,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, Any]:
    """Measure the latency table, and whole UNets to compare it with; returns JSON values.

    Everything is measured in turns, so that all of it meets the same other load of the machine. All of it is
    measured once more if the two disagree.

    Args:
        settings: of the measurement.
        architectures: by name, all of the same channels and image size, as a model and what evolves from it.
        tokens: of an encoded caption.
        on_turn: receives the number of finished turns.

    Raises:
        LatencyError: if the runtime cannot run in that precision or on that device.
    """
    setup = setting_of(settings)
    torch.set_num_threads(settings.threads)
    dimensions = dimensions_of(next(iter(architectures.values())), batch=settings.batch, tokens=tokens)
    parts = {str(part): part for part in reachable_parts(*architectures.values())}
    backend = backend_of(settings)
    runs = {
        name: backend.benchmark(
            module_of(part, dimensions=dimensions), inputs_of(part, dimensions=dimensions)
        )
        for name, part in parts.items()
    }
    for name, architecture in architectures.items():
        runs[f"{_WHOLE_PREFIX}{name}"] = unet_benchmark(settings, architecture, tokens=tokens)

    def measure() -> dict[str, Any]:
        """Time all parts and whole UNets in turns; the record without its mark."""
        times = time_in_turns(runs, turns=settings.turns, on_turn=on_turn)
        table = LatencyTable(
            setup=setup,
            date=datetime.now(UTC).date().isoformat(),
            dimensions=dimensions,
            parts=tuple(PartLatency(part=part, times=times[name]) for name, part in parts.items()),
        )
        return {
            "table": table.to_values(),
            "unets": unet_records(
                architectures,
                table=table,
                measured={name: times[f"{_WHOLE_PREFIX}{name}"] for name in architectures},
            ),
        }

    return measure_undisturbed(measure)


def measure_undisturbed(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record that `measure` returns, or if that was disturbed its next, and whether it was disturbed."""
    record = measure()
    if is_disturbed(record):
        logger.info(f"  disturbed: {error_text(record)}; measured once more")
        record = measure()
    return {**record, "disturbed": is_disturbed(record)}


def is_disturbed(record: Mapping[str, Any]) -> bool:
    """Whether the prediction for a whole UNet is off by more than `MAX_ERROR` of its measured time."""
    return any(abs(unet["error"]) > MAX_ERROR for unet in record["unets"].values())


def error_text(record: Mapping[str, Any]) -> str:
    """By how much the predictions are off, in words."""
    errors = ", ".join(f"{100 * unet['error']:+.0f} % for {name}" for name, unet in record["unets"].items())
    return f"the sum of the parts is off by {errors}"


def latency_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each whole UNet of a record, and one if the measurement was disturbed."""
    for name, unet in record["unets"].items():
        yield (
            f"{name}: {unet['measured']['median_ms']:.4g} ms measured, {unet['predicted_ms']:.4g} ms "
            f"predicted ({100 * unet['error']:+.1f} %), {unet['parameters']:,} parameters"
        )
    if record.get("disturbed"):
        yield (
            f"disturbed, and so no result: {error_text(record)}, twice; at most {MAX_ERROR:.0%} is accepted. "
            "Remove the file and measure while the machine does nothing else"
        )


def unet_records(
    architectures: Mapping[str, Architecture], *, table: LatencyTable, measured: Mapping[str, Timing]
) -> dict[str, Any]:
    """Measured and predicted latency of whole UNets by name, as JSON values; of those that were measured."""
    return {
        name: _unet_record(architectures[name], table=table, measured=timing)
        for name, timing in measured.items()
    }


def _unet_record(architecture: Architecture, *, table: LatencyTable, measured: Timing) -> dict[str, Any]:
    """A UNet's measured and predicted latency, and its cost by stage and block."""
    predicted = table.predict_ms(architecture)
    costs = costs_of(architecture, tokens=table.dimensions.tokens)
    stages = [
        {**row, "parameters": cost.parameters, "macs": cost.macs}
        for row in latency_by_stage(table, architecture)
        for cost in [costs.of_stage(row["stage"])]
    ]
    return {
        "architecture": architecture.to_values(),
        "measured": measured.to_values(),
        "predicted_ms": predicted,
        "error": predicted / measured.median_ms - 1.0,
        "parameters": costs.total.parameters,
        "macs": costs.total.macs,
        "stages": stages,
        "blocks": [
            {"name": block.name, "ms": table.block_ms(architecture, block.name)}
            for block in architecture.blocks
        ],
    }
