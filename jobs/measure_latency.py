"""Measure what each part of the model's UNet takes on this machine. SnapFusion Sec. 2.2, Table 1, Fig. 2.

OUT/latency/RUNTIME-PRECISION-DEVICE.json   the table, and how well it predicts whole UNets

Beside the model's own UNet stands Table 3's, made of it. Everything takes turns, so all of it meets the same
other load. A table that was measured elsewhere, as on a phone, has the same form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from jobs.exits import leave
from pipelines.storage import exists, replace_object
from snapfusion.evolution.latency import LatencyTable, PartTime, Precision, Setting, by_stage, reachable_parts
from snapfusion.evolution.parts import frame_of, inputs_of, module_of
from snapfusion.evolution.runtimes import Runtime, ready
from snapfusion.evolution.stopwatch import Times, take_turns
from snapfusion.models.architecture import Architecture, ArchitectureError, table_3
from snapfusion.models.cost import costs_of
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build
from snapfusion.settings import Settings

if TYPE_CHECKING:
    from jobs.cli import Job

_LAST_STEP = 999.0
_WHOLE = "whole "


class LatencySettings(Settings):
    """How the table is measured.

    Attributes:
        runtime: what computes.
        precision: of the networks.
        device: where.
        threads: of the CPU.
        batch: latents at once; 2 is one that is guided.
        tokens: of an encoded caption; null takes as many as the model's tokenizer gives.
        turns: of each part.
    """

    runtime: Runtime = "torch"
    precision: Precision = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt = 1
    batch: PositiveInt = 2
    tokens: PositiveInt | None = None
    turns: int = Field(20, ge=2)

    @property
    def name(self) -> str:
        """Of the table's file."""
        return f"{self.runtime}-{self.precision}-{self.device}"


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
    torch.set_num_threads(settings.threads)
    frame = frame_of(next(iter(architectures.values())), batch=settings.batch, tokens=tokens)
    parts = {str(part): part for part in reachable_parts(*architectures.values())}
    runs = {
        name: _ready(module_of(part, frame=frame), inputs_of(part, frame=frame), settings=settings)
        for name, part in parts.items()
    }
    for name, architecture in architectures.items():
        inputs = _inputs(architecture, settings=settings, tokens=tokens)
        runs[f"{_WHOLE}{name}"] = _ready(build(architecture).eval(), inputs, settings=settings)
    times = take_turns(runs, turns=settings.turns, on_turn=on_turn)
    table = LatencyTable(
        setting=setting_of(settings),
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


def setting_of(settings: LatencySettings) -> Setting:
    """Where and how this machine measures."""
    on_cpu = settings.device == "cpu"
    return Setting(
        device=_processor() if on_cpu else torch.cuda.get_device_name(),
        runtime=settings.runtime,
        precision=settings.precision,
        threads=settings.threads if on_cpu else 0,
    )


def _processor() -> str:
    """What the machine calls its CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, f"CPU, {torch.backends.cpu.get_cpu_capability()}")


def _inputs(architecture: Architecture, *, settings: LatencySettings, tokens: int) -> tuple[Tensor, ...]:
    side = architecture.sample_size
    return (
        torch.randn(settings.batch, architecture.in_channels, side, side),
        torch.full((settings.batch,), _LAST_STEP),
        torch.randn(settings.batch, tokens, architecture.context),
    )


def _ready(
    network: torch.nn.Module, inputs: Sequence[Tensor], *, settings: LatencySettings
) -> Callable[[], None]:
    return ready(
        network,
        inputs,
        runtime=settings.runtime,
        precision=settings.precision,
        device=torch.device(settings.device),
    )


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
    architectures, tokens = architectures_of(architecture_of(bundle.unet)), _tokens(job, bundle.tokenizer)
    del bundle  # its networks would stand beside those that are measured
    told = measure_latency(
        settings,
        architectures=architectures,
        tokens=tokens,
        on_turn=lambda turn: print(f"  {turn} of {settings.turns} turns", flush=True),
    )
    replace_object(place, json.dumps(told, indent=1).encode())
    for name, unet in told["unets"].items():
        print(
            f"  {name}: {unet['measured']['median_ms']:.4g} ms measured, {unet['predicted_ms']:.4g} ms "
            f"predicted ({100 * unet['error']:+.1f} %), {unet['parameters']:,} parameters"
        )
    print(f"  {place}")


def architectures_of(origin: Architecture) -> dict[str, Architecture]:
    """A model's architecture, and Table 3's of it where it has the levels for one."""
    try:
        return {"origin": origin, "table-3": table_3(origin)}
    except ArchitectureError:
        return {"origin": origin}


def table_place(job: Job) -> str:
    """The file of the run's table."""
    return job.place(f"latency/{job.recipe.latency.name}.json")


def _tokens(job: Job, tokenizer: Any) -> int:  # noqa: ANN401 - a tokenizer of transformers
    return job.recipe.latency.tokens or int(tokenizer.model_max_length)


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
