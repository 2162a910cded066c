"""Hold Table 3's UNet and the half-width decoder against the model's own. SnapFusion Table 1 and 5.

OUT/efficiency/RUNTIME-PRECISION-DEVICE.json   a step, the loop, memory, parameters; the decoders

Only shapes count here, so the UNets have random weights. What is compared takes turns; the loops of steps are
executed, once each; memory is that of a process in which a UNet is alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs.evaluation.efficiency import LOOP_STEPS, MeasuredModel, measure_efficiency, summary
from jobs.evaluation.timing import ORIGIN, TABLE_3
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.versions import versions
from pipelines.storage.objects import exists, replace_object
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.measure_efficiency`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("measure_efficiency", measure, preview=preview, about=__doc__, argv=argv)


def measure(job: Job) -> None:
    """Measure, and write the file; one that is there is left."""
    settings, place = job.recipe.efficiency, efficiency_url(job)
    if exists(place):
        print(f"  {place} is there already")
        return
    bundle = load(job.recipe.model)
    model = MeasuredModel(
        architecture=architecture_of(bundle.unet),
        vae=bundle.vae,
        schedule=bundle.schedule,
        prediction_type=bundle.prediction_type,
        tokens=settings.tokens_of(bundle.tokenizer),
    )
    del bundle  # its UNet would stand beside those that are measured
    told = {
        "recipe": job.recipe.name,
        "model": job.recipe.model,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "settings": settings.to_values(),
        **measure_efficiency(
            settings,
            model=model,
            say=lambda line: print(f"  {line}", flush=True),
        ),
    }
    replace_object(place, json.dumps(told, indent=1).encode())
    for line in summary(told):
        print(f"  {line}")
    print(f"  {place}")


def efficiency_url(job: Job) -> str:
    """The run's file."""
    return job.url(f"efficiency/{job.recipe.efficiency.name}.json")


def preview(job: Job) -> list[str]:
    """What would be measured."""
    settings, place = job.recipe.efficiency, efficiency_url(job)
    there = "which is there already" if exists(place) else "which is not there yet"
    loops = (
        f" and execute {LOOP_STEPS[ORIGIN]} steps of one, {LOOP_STEPS[TABLE_3]} of the other"
        if settings.loop
        else ""
    )
    return [
        f"would take {settings.turns} turns of a step of {job.recipe.model}'s UNet and of Table 3's{loops}, "
        f"by {settings.runtime} in {settings.precision} on {settings.device}, into {place} ({there})"
    ]


if __name__ == "__main__":
    exit_process(main())
