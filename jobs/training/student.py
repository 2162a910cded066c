"""A UNet that is trained on a table and left as diffusers folders: what fine-tuning and distillation share.

OUT/model/          the student, its averaged weights where an average is kept
OUT/raw/            then also the student with its last weights
OUT/best/           if it was watched, the student as it was at its best
OUT/watch/          then also what it drew on the way
OUT/logs/           the course of training, for TensorBoard
OUT/metrics.json    what it was made of and from, how it was trained, how good it is
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import UNetTrainingSettings
from jobs.training.spec import TrainingError, TrainingFactory
from jobs.training.trainer import TrainingResult, run_trainings
from jobs.training.validation import Validator
from pipelines.tables.leases import read_leases
from pipelines.tables.table import Snapshot
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.guidance_embedding import WEIGHT_NAME, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import BlockUNet
from snapfusion.settings import digest

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

UNET = "unet"
"""The name of the one training."""

STUDENT_KIND = "student"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def absolute_source(source: str) -> str:
    """A model's source as a worker, which stands in another folder, understands it."""
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def trainable_unet(bundle: Bundle, *, settings: UNetTrainingSettings) -> UNet2DConditionModel | BlockUNet:
    """The UNet of `bundle`, ready to be trained."""
    unet = bundle.unet.requires_grad_(requires_grad=True)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def make_validator(
    settings: UNetTrainingSettings, *, student: str, size: int, steps: int | None, device: torch.device
) -> Validator | None:
    """What looks at a student of `size` pixels that takes `steps` on the way, if the settings want it."""
    if settings.watch.every is None:
        return None
    return Validator(
        settings.watch,
        every=settings.watch.every,
        model=student,
        size=size,
        steps=steps,
        device=device,
        threads=settings.trainer.threads_per_worker,
    )


def table_identity(table: Snapshot) -> dict[str, Any]:
    """What a training's identity says of a table."""
    return {"identity": digest(table.identity), "version": table.version}


def train_student(
    settings: UNetTrainingSettings,
    *,
    result: RunFolder,
    program: TrainingFactory,
    arguments: Mapping[str, Any],
    identity: Mapping[str, Any],
    parents: Mapping[str, Any],
    student: str,
    size: int,
    distillation: Mapping[str, Any] | None,
    on_report: OnReport,
) -> dict[str, Any]:
    """Train the UNet of `student` to predict v, and publish it; what was begun is gone on with.

    Args:
        settings: how.
        result: where.
        program: assembles one training, by the name `UNET`; is given `settings` and `identity` besides.
        arguments: of `program`.
        identity: everything that decides the weights.
        parents: what it is made from, for the metrics.
        student: the source of its first weights, and of all but the UNet.
        size: of the pictures that it was trained on, which it is to draw from then on.
        distillation: what the folder is to say of the steps it was distilled for.
        on_report: told of the training's progress.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if something else was begun here, or training cannot end.
        TrainingFailed: if workers keep failing.
    """
    began = time.monotonic()
    result.begin(identity)
    with read_leases(parents.values(), purpose=f"the training {result.url}"):
        trained = run_trainings(
            program,
            {**arguments, "settings": settings, "identity": dict(identity)},
            store_url=result.store_url,
            settings=settings.trainer,
            on_report=on_report,
        )[UNET]

    def fill(folder: Path) -> dict[str, Any]:
        weights = save_student(
            trained,
            student=student,
            size=size,
            folder=folder,
            settings=settings,
            distillation=distillation,
        )
        return {
            "kind": result.kind,
            "identity": identity,
            "settings": settings.to_values(),
            "settings_hash": digest(identity),
            "parents": parents,
            "distillation": distillation,
            "weights": weights,
            "evaluation": trained.evaluation,
            "watch": trained.validations,
            "best": _best_record(trained, settings=settings),
            "curve": trained.curve,
            "environment": trained.environment,
            "seconds": round(time.monotonic() - began, 1),
        }

    return result.publish(fill)


def _best_record(trained: TrainingResult, *, settings: UNetTrainingSettings) -> dict[str, Any] | None:
    """The step whose weights are kept as the best, by what, and what was seen there."""
    if trained.best is None:
        return None
    seen = next(seen for seen in trained.validations if seen["step"] == trained.best.step)
    return {**seen, "by": settings.watch.best}


def save_student(
    trained: TrainingResult,
    *,
    student: str,
    size: int,
    folder: Path,
    settings: UNetTrainingSettings,
    distillation: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Write the folders model, raw and best; gives the SHA-256 of each one's UNet, as it was trained."""
    kinds: dict[str, Mapping[str, torch.Tensor]] = {"model": trained.weights}
    if settings.loop.ema_decay is not None:
        kinds["raw"] = trained.raw_weights
    if trained.best is not None:
        kinds["best"] = trained.best.weights
    hashes = {}
    for name, weights in kinds.items():
        bundle = dataclasses.replace(load(student), prediction_type="v_prediction")
        if WEIGHT_NAME in weights:
            bundle.unet = with_guidance_embedding(bundle.unet)
        bundle.unet.load_state_dict(weights)
        bundle.resize(size)
        hashes[name] = weight_hash(bundle.unet)
        save(bundle, folder / name, dtype=DTYPES[settings.saved_as], distillation=distillation)
        del bundle  # before the next is loaded
    return hashes


def check_held_out(found: object, *, settings: UNetTrainingSettings, table: Snapshot) -> None:
    """Refuse a table of which no row is held out, so that there would be nothing to evaluate on.

    Raises:
        TrainingError: if `found`, the first held-out batch, is None.
    """
    if found is None:
        raise TrainingError(
            f"of {table.num_rows} rows none is held out for evaluation; raise loader.held_out "
            f"(now {settings.loader.held_out}), or add rows to {table.url}"
        )
