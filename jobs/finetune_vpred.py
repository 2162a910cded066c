"""Fine-tune a model that predicts eps into one that predicts v, from its own weights. SnapFusion Eq. 6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from jobs.exits import leave
from jobs.reports import OnReport, show_reports
from jobs.result import METRICS, Result
from jobs.student import (
    KIND,
    UNET,
    StudentTraining,
    check_held_out,
    make_student,
    placed,
    table_identity,
    trainable_unet,
    watcher,
)
from jobs.training import Training, TrainingError
from jobs.watch import check_watch, in_run
from pipelines.buckets import BucketLoader, Count, count_rows, loader_of
from pipelines.latents import check_latents, size_of
from pipelines.loader import BatchLoader
from pipelines.storage import absolute, exists
from pipelines.tables import Snapshot, open_table
from snapfusion.models.blocks import skip
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.unet import BlockUNet
from snapfusion.training.batch import Batch
from snapfusion.training.captions import Captions
from snapfusion.training.loop import LoopSettings, Objective
from snapfusion.training.robust import RobustObjective, SkipSettings
from snapfusion.training.velocity import VelocityObjective, VelocitySettings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from jobs.cli import Job

_COLUMNS = ("latent", "token_ids")
_EVALUATION = -1
"""The step whose draws the evaluation takes: none that training takes."""


class VpredSettings(StudentTraining):
    """How a v model is made. The defaults are the miniature's.

    Attributes:
        velocity: what the loss draws.
        skip: how often blocks are left out (Eq. 5, robust training); null for never.
        loop: the optimizer's settings.
    """

    velocity: VelocitySettings = VelocitySettings()
    skip: SkipSettings | None = None
    loop: LoopSettings = LoopSettings(
        num_steps=1000, global_batch=64, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99
    )


Kind = TypeVar("Kind", bound=VpredSettings)


def finetune_vpred(
    settings: VpredSettings,
    *,
    model: str,
    latents_url: str,
    out_url: str,
    latents_version: int | None = None,
    further: bool = False,
    on_report: OnReport = lambda figures: None,
) -> dict[str, Any]:
    """Train the v model and publish it at `out_url`, whole or not at all (`jobs.student` shows its files).

    A run that was killed goes on where it stood, with the version of LATENTS that it began with; a folder
    that is published is left as it is.

    Args:
        settings: how.
        model: the eps model, a source that `snapfusion.models.load` accepts.
        latents_url: of the table LATENTS.
        out_url: of the folder to make.
        latents_version: of the table; None takes what the run began with, or else the newest.
        further: whether a model that predicts v already is trained on, as a control for step distillation.
        on_report: told of the training's progress.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if the model predicts v already and is not to go `further`, `out_url` holds or has
            begun something else, or training cannot end.
        TableError: if LATENTS do not fit the model.
        TrainingFailed: if workers keep failing.
    """
    result, model = Result(url=absolute(out_url), kind=KIND), placed(model)
    bundle = load(model)
    if bundle.prediction_type == "v_prediction" and not further:
        raise TrainingError(f"{model} predicts v already; there is nothing to fine-tune")
    pinned = result.pinned_version("latents") if latents_version is None else latents_version
    latents = open_table(latents_url, version=pinned, kind="latents")
    counts = check_rows(settings, bundle=bundle, latents=latents)
    identity = {
        "objective": "velocity",
        "settings": settings.deciding(),
        "model": bundle.describe(),
        "latents": table_identity(latents),
    }
    finished = result.finished(identity)
    if finished is not None:
        return finished
    weights, size = bundle.fingerprint(), size_of(latents.identity, bundle=bundle)
    del bundle  # a worker beside this process needs the memory
    return make_student(
        settings,
        result=result,
        program=assemble,
        arguments={
            "model": model,
            "latents_url": latents.url,
            "latents_version": latents.version,
            "counts": counts,
        },
        identity=identity,
        parents={"latents": latents.lineage(), "model": {"source": model, "weights": weights}},
        student=model,
        size=size,
        distillation=None,
        on_report=on_report,
    )


def check_rows(settings: VpredSettings, *, bundle: Bundle, latents: Snapshot) -> Sequence[Count]:
    """Refuse rows that a model cannot be trained on; returns how many each unit has to train on.

    Raises:
        TableError: if LATENTS do not fit the model.
        TrainingError: if none of them is held out, or the model cannot be watched as the settings say.
    """
    check_latents(latents, bundle=bundle)
    check_watch(settings.watch, size=size_of(latents.identity, bundle=bundle))
    counts = count_rows(latents, held_out=settings.loader.held_out)
    held_out = _loader(settings, latents=latents, counts=counts).held_out(rows=1, limit=1)
    check_held_out(next(held_out, None), settings=settings, table=latents)
    return counts


def assemble(
    *,
    settings: VpredSettings,
    model: str,
    latents_url: str,
    latents_version: int,
    counts: Sequence[Count],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Training]:
    """The training, in a worker."""
    bundle = load(model, device=str(device))
    unet = trainable_unet(bundle, settings=settings)
    objective = VelocityObjective(
        settings.velocity,
        captions=Captions(bundle),
        schedule=bundle.schedule,
        seed=settings.loop.seed,
    )
    robust: Objective = objective
    if settings.skip is not None:
        robust = RobustObjective(objective, settings=settings.skip, seed=settings.loop.seed)
    latents = open_table(latents_url, version=latents_version)
    loader = _loader(settings, latents=latents, counts=counts)
    yield Training(
        name=UNET,
        model=unet,
        objective=robust,
        leaves_out=settings.skip is not None,
        loader=loader,
        settings=settings.loop,
        identity=dict(identity),
        evaluate=partial(
            _evaluate,
            unet,
            objective=objective,
            batches=partial(
                loader.held_out, rows=settings.trainer.micro_batch, limit=settings.evaluation_rows
            ),
            device=device,
        ),
        watch=watcher(
            settings,
            student=model,
            size=size_of(latents.identity, bundle=bundle),
            steps=None,
            device=device,
        ),
    )


def _loader(
    settings: VpredSettings, *, latents: Snapshot, counts: Sequence[Count]
) -> BatchLoader | BucketLoader:
    return loader_of(
        latents,
        columns=_COLUMNS,
        global_batch=settings.loop.global_batch,
        seed=settings.loop.seed,
        settings=settings.loader,
        counts=counts,
    )


@torch.no_grad()
def _evaluate(
    unet: UNet2DConditionModel | BlockUNet,
    *,
    objective: VelocityObjective,
    batches: partial[Iterator[Batch]],
    device: torch.device,
) -> dict[str, Any]:
    """L_ori on the held-out rows."""
    unet.eval()
    skip(unet, ())
    losses = torch.cat([objective(unet, batch.to(device), step=_EVALUATION) for batch in batches()])
    return {"rows": len(losses), "loss": float(losses.mean())}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.finetune_vpred`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("finetune_vpred", finetune, preview=preview, about=__doc__, argv=argv)


def finetune(job: Job) -> None:
    """Make the run's v model; one that is there already is left, and a model that predicts v has no need."""
    if load(job.recipe.model).prediction_type == "v_prediction":
        print(f"  {job.recipe.model} predicts v already")
        return
    place = job.place("vpred")
    metrics = train_in_run(job, job.recipe.vpred, model=job.recipe.model, place=place)
    evaluation = metrics["evaluation"]
    print(f"  {place}/model: L_ori {evaluation['loss']:.5f} on {evaluation['rows']} held-out rows")


def train_in_run(
    job: Job, settings: VpredSettings, *, model: str, place: str, further: bool = False
) -> dict[str, Any]:
    """`finetune_vpred` on the LATENTS of the job's run; Ray is there only if there is something to train."""
    from jobs.cluster import connect

    if not exists(f"{place}/{METRICS}"):
        connect(job.recipe.cluster)
    return finetune_vpred(
        placed_in_run(settings, job),
        model=model,
        latents_url=job.place("latents"),
        out_url=place,
        further=further,
        on_report=show_reports(),
    )


def placed_in_run(settings: Kind, job: Job) -> Kind:
    """The settings with what the watch reads where it lies in the job's run."""
    return settings.model_copy(update={"watch": in_run(settings.watch, job)})


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    loop, place = job.recipe.vpred.loop, job.place("vpred")
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would fine-tune {job.recipe.model} to predict v on {job.place('latents')} for {loop.num_steps} "
        f"steps of {loop.global_batch} rows, into {place} ({held}); not if it predicts v already"
    ]


if __name__ == "__main__":
    leave(main())
