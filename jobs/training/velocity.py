"""Training by the velocity loss L_ori under Ray Train: fine-tuning, robust training, efficient UNets. SnapFusion Eq. 5, 6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import VpredSettings
from jobs.training.spec import Training, TrainingError
from jobs.training.student import (
    STUDENT_KIND,
    UNET,
    absolute_source,
    check_held_out,
    make_validator,
    table_identity,
    train_student,
    trainable_unet,
)
from jobs.training.validation import check_validation
from pipelines.datasets.latents import check_latents, image_size_of
from pipelines.loading.buckets import BucketLoader, RowCount, count_training_rows, make_loader
from pipelines.loading.loader import BatchLoader
from pipelines.storage.objects import absolute_url
from pipelines.tables.table import Snapshot, open_table
from snapfusion.models.blocks import set_skipped_blocks
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.unet import BlockUNet
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.loop import Objective
from snapfusion.training.robust import RobustObjective
from snapfusion.training.velocity import VelocityObjective

_COLUMNS = ("latent", "token_ids")


_EVALUATION_STEP = -1
"""The step whose draws the evaluation takes: none that training takes."""


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
    """Train the v model and publish it at `out_url`, whole or not at all (`jobs.training.student` shows its files).

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
    result, model = RunFolder(url=absolute_url(out_url), kind=STUDENT_KIND), absolute_source(model)
    bundle = load(model)
    if bundle.prediction_type == "v_prediction" and not further:
        raise TrainingError(f"{model} predicts v already; there is nothing to fine-tune")
    pinned = result.pinned_version("latents") if latents_version is None else latents_version
    latents = open_table(latents_url, version=pinned, kind="latents")
    counts = check_training_rows(settings, bundle=bundle, latents=latents)
    identity = {
        "objective": "velocity",
        "settings": settings.deciding(),
        "model": bundle.describe(),
        "latents": table_identity(latents),
    }
    finished = result.finished(identity)
    if finished is not None:
        return finished
    weights, size = bundle.fingerprint(), image_size_of(latents.identity, bundle=bundle)
    del bundle  # a worker beside this process needs the memory
    return train_student(
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


def check_training_rows(settings: VpredSettings, *, bundle: Bundle, latents: Snapshot) -> Sequence[RowCount]:
    """Refuse rows that a model cannot be trained on; returns how many each unit has to train on.

    Raises:
        TableError: if LATENTS do not fit the model.
        TrainingError: if none of them is held out, or the model cannot be watched as the settings say.
    """
    check_latents(latents, bundle=bundle)
    check_validation(settings.watch, size=image_size_of(latents.identity, bundle=bundle))
    counts = count_training_rows(latents, held_out=settings.loader.held_out)
    held_out = _loader(settings, latents=latents, counts=counts).held_out(rows=1, limit=1)
    check_held_out(next(held_out, None), settings=settings, table=latents)
    return counts


def assemble(
    *,
    settings: VpredSettings,
    model: str,
    latents_url: str,
    latents_version: int,
    counts: Sequence[RowCount],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Training]:
    """The training, in a worker."""
    bundle = load(model, device=str(device))
    unet = trainable_unet(bundle, settings=settings)
    objective = VelocityObjective(
        settings.velocity,
        captions=CaptionEncoder(bundle),
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
        watch=make_validator(
            settings,
            student=model,
            size=image_size_of(latents.identity, bundle=bundle),
            steps=None,
            device=device,
        ),
    )


def _loader(
    settings: VpredSettings, *, latents: Snapshot, counts: Sequence[RowCount]
) -> BatchLoader | BucketLoader:
    return make_loader(
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
    set_skipped_blocks(unet, ())
    losses = torch.cat([objective(unet, batch.to(device), step=_EVALUATION_STEP) for batch in batches()])
    return {"rows": len(losses), "loss": float(losses.mean())}
