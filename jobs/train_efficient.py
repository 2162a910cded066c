"""Give a v model another architecture, Table 3's or an evolved one, and train it. SnapFusion App. A.

OUT/efficient-first/   the model at its first weights, each block's own where it has them
OUT/efficient/         the model after training, as `jobs.finetune_vpred` leaves it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.exits import leave
from jobs.finetune_vpred import VpredSettings, train_in_run
from jobs.first_weights import TABLE_3, named_architecture, own_architecture, with_architecture
from jobs.plans import VPRED
from jobs.result import METRICS
from pipelines.storage import exists
from snapfusion.models.cost import costs_of
from snapfusion.settings import Settings

if TYPE_CHECKING:
    from jobs.cli import Job


class EfficientSettings(Settings):
    """Which model, which architecture, and how it is trained.

    Attributes:
        begin: the source of the model that gives the first weights; it predicts v. In a job also "run:" and a
            place in the run.
        architecture: "table-3", "own", or the URL of an architecture's file, as `jobs.evolve_unet` leaves
            one; in a job also "run:" and a place in the run.
        training: L_ori (Eq. 6), the loss that the paper trains its UNet by before its steps are distilled.
    """

    begin: str = VPRED
    architecture: str = TABLE_3
    training: VpredSettings = VpredSettings()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.train_efficient`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("train_efficient", train_efficient, preview=preview, about=__doc__, argv=argv)


def train_efficient(job: Job) -> None:
    """Make the run's efficient model; one that is there already is left."""
    settings, place = job.recipe.efficient, job.place("efficient")
    begin = job.source(settings.begin)
    origin = own_architecture(begin)
    architecture = named_architecture(job.source(settings.architecture), of=origin)
    first = with_architecture(begin, architecture, url=job.place("efficient-first"))
    metrics = train_in_run(job, settings.training, model=first, place=place, further=True)
    sizes = [costs_of(one).whole.parameters for one in (origin, architecture)]
    print(
        f"  {place}/model: {sizes[1]:,} parameters of {sizes[0]:,}, L_ori "
        f"{metrics['evaluation']['loss']:.5f} on {metrics['evaluation']['rows']} held-out rows"
    )


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    settings, place = job.recipe.efficient, job.place("efficient")
    loop = settings.training.loop
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would give {job.source(settings.begin)} the architecture {job.source(settings.architecture)} and "
        f"train it on {job.place('latents')} for {loop.num_steps} steps of {loop.global_batch} rows, into "
        f"{place} ({held})"
    ]


if __name__ == "__main__":
    leave(main())
