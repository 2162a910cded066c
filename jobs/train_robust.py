"""Train a v model further with blocks left out at random, so that it bears to lose some. SnapFusion Eq. 5.

OUT/robust/   as `jobs.finetune_vpred` leaves a model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli.in_run import train_in_run
from jobs.runtime.exit_codes import exit_process
from jobs.training.run_folder import METRICS
from pipelines.storage.objects import exists

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.train_robust`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("train_robust", train_robust, preview=preview, about=__doc__, argv=argv)


def train_robust(job: Job) -> None:
    """Make the run's robust model; one that is there already is left."""
    settings, place = job.recipe.robust, job.url("robust")
    model = job.resolve(settings.begin)
    metrics = train_in_run(job, settings.training, model=model, place=place, further=True)
    evaluation = metrics["evaluation"]
    print(
        f"  {place}/model: L_ori {evaluation['loss']:.5f} on {evaluation['rows']} held-out rows, all blocks"
    )


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    settings, place = job.recipe.robust, job.url("robust")
    loop, skip = settings.training.loop, settings.training.skip
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would train {job.resolve(settings.begin)} on {job.url('latents')} for {loop.num_steps} steps of "
        f"{loop.global_batch} rows, each without a cross-attention block with probability {skip.attention:g} "
        f"and a ResNet block with {skip.resnet:g}, into {place} ({held})"
    ]


if __name__ == "__main__":
    exit_process(main())
