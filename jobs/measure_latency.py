"""Measure what each part of the model's UNet takes on this machine. SnapFusion Sec. 2.2, Table 1, Fig. 2.

OUT/latency/RUNTIME-PRECISION-DEVICE.json   the table, and how well it predicts whole UNets
OUT/latency/...-ms.svg, -parameters.svg     Fig. 2

Beside the model's own UNet stands Table 3's, made of it. Everything takes turns, so all of it meets the same
other load. A table that was measured elsewhere, as on a phone, has the same form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from jobs.anatomy import charts_of
from jobs.chart import standalone
from jobs.exits import leave
from jobs.timing import TimingSettings, architectures_of, setting_of
from pipelines.storage import exists, replace_object
from snapfusion.evolution.latency import LatencyTable, PartTime, by_stage, reachable_parts
from snapfusion.evolution.parts import frame_of, inputs_of, module_of
from snapfusion.evolution.stopwatch import Times, take_turns
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import costs_of
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build

if TYPE_CHECKING:
    from jobs.cli import Job

_WHOLE = "whole "


class LatencySettings(TimingSettings):
    """How the table is measured."""


def measure_latency(
    settings: LatencySettings,
    *,
    architectures: Mapping[str, Architecture],
    tokens: int,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[str, Any]:
    """The table, and each UNet as a whole, as JSON values.

    Args:
        settings: how.
        architectures: by name; all of one frame, as a model and what evolves of it are.
        tokens: of an encoded caption.
        on_turn: told of the number of turns that are over.

    Raises:
        LatencyError: if the runtime cannot do it.
    """
    setting = setting_of(settings)
    torch.set_num_threads(settings.threads)
    frame = frame_of(next(iter(architectures.values())), batch=settings.batch, tokens=tokens)
    parts = {str(part): part for part in reachable_parts(*architectures.values())}
    runs = {
        name: settings.ready(module_of(part, frame=frame), inputs_of(part, frame=frame))
        for name, part in parts.items()
    }
    for name, architecture in architectures.items():
        inputs = settings.inputs_of(architecture, tokens=tokens)
        runs[f"{_WHOLE}{name}"] = settings.ready(build(architecture).eval(), inputs)
    times = take_turns(runs, turns=settings.turns, on_turn=on_turn)
    table = LatencyTable(
        setting=setting,
        date=datetime.now(UTC).date().isoformat(),
        frame=frame,
        parts=tuple(PartTime(part=part, times=times[name]) for name, part in parts.items()),
    )
    return {
        "table": table.to_values(),
        "unets": {
            name: _told(architecture, table=table, measured=times[f"{_WHOLE}{name}"], tokens=tokens)
            for name, architecture in architectures.items()
        },
    }


def _told(architecture: Architecture, *, table: LatencyTable, measured: Times, tokens: int) -> dict[str, Any]:
    """What is said of a UNet: its measured time beside the table's, its stages, its size."""
    predicted = table.predict_ms(architecture)
    costs = costs_of(architecture, tokens=tokens)
    stages = [
        {**row, "parameters": cost.parameters, "macs": cost.macs}
        for row in by_stage(table, architecture)
        for cost in [costs.of_stage(row["stage"])]
    ]
    return {
        "architecture": architecture.to_values(),
        "measured": measured.to_values(),
        "predicted_ms": predicted,
        "error": predicted / measured.median_ms - 1.0,
        "parameters": costs.whole.parameters,
        "macs": costs.whole.macs,
        "stages": stages,
        "blocks": [
            {"name": block.name, "ms": table.block_ms(architecture, block.name)}
            for block in architecture.blocks
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.measure_latency`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("measure_latency", measure, preview=preview, about=__doc__, argv=argv)


def measure(job: Job) -> None:
    """Measure, and write the run's table; one that is there is left."""
    settings, place = job.recipe.latency, table_place(job)
    if exists(place):
        print(f"  {place} is there already")
        return
    bundle = load(job.recipe.model)
    architectures = architectures_of(architecture_of(bundle.unet))
    tokens = settings.tokens_of(bundle.tokenizer)
    del bundle  # its networks would stand beside those that are measured
    told = measure_latency(
        settings,
        architectures=architectures,
        tokens=tokens,
        on_turn=lambda turn: print(f"  {turn} of {settings.turns} turns", flush=True),
    )
    for kind, chart in charts_of(told).items():
        replace_object(job.place(f"latency/{settings.name}-{kind}.svg"), standalone(chart))
    replace_object(place, json.dumps(told, indent=1).encode())
    for name, unet in told["unets"].items():
        print(
            f"  {name}: {unet['measured']['median_ms']:.4g} ms measured, {unet['predicted_ms']:.4g} ms "
            f"predicted ({100 * unet['error']:+.1f} %), {unet['parameters']:,} parameters"
        )
    print(f"  {place}")


def table_place(job: Job) -> str:
    """The file of the run's table."""
    return job.place(f"latency/{job.recipe.latency.name}.json")


def preview(job: Job) -> list[str]:
    """What would be measured."""
    settings = job.recipe.latency
    there = "which is there already" if exists(table_place(job)) else "which is not there yet"
    return [
        f"would take {settings.turns} turns of each part of {job.recipe.model}'s UNet, by {settings.runtime} "
        f"in {settings.precision} on {settings.device}, into {table_place(job)} ({there})"
    ]


if __name__ == "__main__":
    leave(main())
