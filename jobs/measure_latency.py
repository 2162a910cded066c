"""Measure what each part of the model's UNet takes on this machine. SnapFusion Sec. 2.2, Table 1, Fig. 2.

OUT/latency/RUNTIME-PRECISION-DEVICE.json   the table, and how well it predicts whole UNets
OUT/latency/...-ms.svg, -parameters.svg     Fig. 2

Beside the model's own UNet stands Table 3's, made of it. Everything takes turns, so all of it meets the same
other load. A table that was measured elsewhere, as on a phone, has the same form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli.inputs import latency_table_url
from jobs.evaluation.latency import measure_latency
from jobs.evaluation.timing import architectures_of
from jobs.reports.charts import standalone_svg
from jobs.reports.latency_breakdown import breakdown_charts
from jobs.runtime.exit_codes import exit_process
from pipelines.storage.objects import exists, replace_object
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.measure_latency`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("measure_latency", measure, preview=preview, about=__doc__, argv=argv)


def measure(job: Job) -> None:
    """Measure, and write the run's table; one that is there is left."""
    settings, place = job.recipe.latency, latency_table_url(job)
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
    for kind, chart in breakdown_charts(told).items():
        replace_object(job.url(f"latency/{settings.name}-{kind}.svg"), standalone_svg(chart))
    replace_object(place, json.dumps(told, indent=1).encode())
    for name, unet in told["unets"].items():
        print(
            f"  {name}: {unet['measured']['median_ms']:.4g} ms measured, {unet['predicted_ms']:.4g} ms "
            f"predicted ({100 * unet['error']:+.1f} %), {unet['parameters']:,} parameters"
        )
    print(f"  {place}")


def preview(job: Job) -> list[str]:
    """What would be measured."""
    settings = job.recipe.latency
    there = "which is there already" if exists(latency_table_url(job)) else "which is not there yet"
    return [
        f"would take {settings.turns} turns of each part of {job.recipe.model}'s UNet, by {settings.runtime} "
        f"in {settings.precision} on {settings.device}, into {latency_table_url(job)} ({there})"
    ]


if __name__ == "__main__":
    exit_process(main())
