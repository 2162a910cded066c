"""Fine-tune a model that predicts eps into one that predicts v, from its own weights. SnapFusion Eq. 6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.cli.in_run import train_in_run
from jobs.runtime.exit_codes import exit_process
from jobs.training.run_folder import METRICS
from pipelines.storage.objects import exists
from snapfusion.models.load import load

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.finetune_vpred`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("finetune_vpred", finetune, preview=preview, about=__doc__, argv=argv)


def finetune(job: Job) -> None:
    """Make the run's v model; one that is there already is left, and a model that predicts v has no need."""
    if load(job.recipe.model).prediction_type == "v_prediction":
        print(f"  {job.recipe.model} predicts v already")
        return
    place = job.url("vpred")
    metrics = train_in_run(job, job.recipe.vpred, model=job.recipe.model, place=place)
    evaluation = metrics["evaluation"]
    print(f"  {place}/model: L_ori {evaluation['loss']:.5f} on {evaluation['rows']} held-out rows")


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    loop, place = job.recipe.vpred.loop, job.url("vpred")
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would fine-tune {job.recipe.model} to predict v on {job.url('latents')} for {loop.num_steps} "
        f"steps of {loop.global_batch} rows, into {place} ({held}); not if it predicts v already"
    ]


if __name__ == "__main__":
    exit_process(main())
