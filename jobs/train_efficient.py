"""Give a v model another architecture, Table 3's or an evolved one, and train it. SnapFusion App. A.

OUT/efficient-first/   the model at its first weights, each block's own where it has them
OUT/efficient/         the model after training, as `jobs.finetune_vpred` leaves it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli.in_run import train_in_run
from jobs.runtime.exit_codes import exit_process
from jobs.training.initial_weights import named_architecture, own_architecture, with_architecture
from jobs.training.run_folder import METRICS
from pipelines.storage.objects import exists
from snapfusion.models.cost import costs_of

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.train_efficient`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("train_efficient", train_efficient, preview=preview, about=__doc__, argv=argv)


def train_efficient(job: Job) -> None:
    """Make the run's efficient model; one that is there already is left."""
    settings, place = job.recipe.efficient, job.url("efficient")
    begin = job.resolve(settings.begin)
    origin = own_architecture(begin)
    architecture = named_architecture(job.resolve(settings.architecture), of=origin)
    first = with_architecture(begin, architecture, url=job.url("efficient-first"))
    metrics = train_in_run(job, settings.training, model=first, place=place, further=True)
    sizes = [costs_of(one).total.parameters for one in (origin, architecture)]
    print(
        f"  {place}/model: {sizes[1]:,} parameters of {sizes[0]:,}, L_ori "
        f"{metrics['evaluation']['loss']:.5f} on {metrics['evaluation']['rows']} held-out rows"
    )


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    settings, place = job.recipe.efficient, job.url("efficient")
    loop = settings.training.loop
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would give {job.resolve(settings.begin)} the architecture {job.resolve(settings.architecture)} and "
        f"train it on {job.url('latents')} for {loop.num_steps} steps of {loop.global_batch} rows, into "
        f"{place} ({held})"
    ]


if __name__ == "__main__":
    exit_process(main())
