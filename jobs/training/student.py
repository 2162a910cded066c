"""Trains a UNet on a table and publishes it as diffusers folders: the frame of every UNet training.

OUT/model/          the student, with averaged weights if an average is kept
OUT/raw/            then also the student with its last weights
OUT/best/           if it was validated, the student with the best weights
OUT/watch/          then also an image grid of each validation
OUT/logs/           the training's logs, for TensorBoard
OUT/metrics.json    parents, settings, training curve and evaluation
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch

from jobs.evaluation.evaluation import absolute_source
from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import UNetTrainingSettings
from jobs.training.spec import Loader, Training, TrainingError, TrainingFactory
from jobs.training.trainer import TrainingResult, run_trainings
from jobs.training.validation import Validator, check_validation
from pipelines.datasets.latents import image_size_of
from pipelines.loading.branches import is_guided_unit
from pipelines.loading.buckets import RowCount, count_training_rows, total_rows
from pipelines.storage.objects import absolute_url
from pipelines.tables.leases import read_leases
from pipelines.tables.table import Snapshot, open_table
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.guidance_embedding import WEIGHT_NAME, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import BlockUNet
from snapfusion.settings import digest
from snapfusion.training.loop import Objective

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

UNET = "unet"
"""Name of the training, and so of its checkpoint store."""

STUDENT_KIND = "student"

EVALUATION_STEP = -1
"""Step number of the evaluation's random draws: one that training never takes."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SettingsT = TypeVar("SettingsT", bound=UNetTrainingSettings)


@dataclass(frozen=True, kw_only=True)
class TrainingTable:
    """The table that a UNet is trained on.

    Attributes:
        role: its key in identities and lineage ("data", "latents").
        kind: "latents" or "targets".
        url: of the table.
        version: to read; None continues with the version that the run began with, else the newest.
        branches: of TARGETS that training reads (`BRANCHES`); empty for a table without branches.
    """

    role: str
    kind: Literal["latents", "targets"]
    url: str
    version: int | None = None
    branches: Sequence[bool] = ()


@dataclass(frozen=True, kw_only=True)
class StudentInputs(Generic[SettingsT]):
    """All that a worker needs to assemble the training of a UNet.

    Attributes:
        settings: of the training.
        sources: model sources by role.
        table_url: of the table.
        table_version: the pinned version.
        counts: training rows of each unit.
        identity: of the training.
    """

    settings: SettingsT
    sources: Mapping[str, str]
    table_url: str
    table_version: int
    counts: Sequence[RowCount]
    identity: Mapping[str, Any]

    def open_table(self) -> Snapshot:
        """The pinned table."""
        return open_table(self.table_url, version=self.table_version)


@dataclass(frozen=True, kw_only=True)
class StudentTraining(Generic[SettingsT]):
    """The training of a UNet that predicts v, from its parents to the published folder.

    Attributes:
        settings: of the training.
        objective: its name in the identity.
        factory: assembles one training, named `UNET`, of `inputs: StudentInputs` and `device`.
        sources: model sources by role.
        role: of the model whose UNet is trained; the rest of the student is taken from it unchanged.
        table: to train on.
        check: refuses a table and models that do not go together; returns what the student's folder records
            of the steps that it was distilled for, if any.
    """

    settings: SettingsT
    objective: str
    factory: TrainingFactory
    sources: Mapping[str, str]
    role: str
    table: TrainingTable
    check: Callable[[Snapshot, Mapping[str, Bundle]], Mapping[str, Any] | None]

    def run(self, out_url: str, *, on_report: OnReport) -> dict[str, Any]:
        """Train, and publish the folder at `out_url`, all or nothing; returns the metrics of metrics.json.

        A run that was killed resumes, with the version of the table that it began with. A published folder
        is left as it is.

        Raises:
            TrainingError: if `out_url` holds or has begun something else, no row is held out, or training
                cannot end.
            TrainingFailed: if workers keep failing.
        """
        began, folder = time.monotonic(), RunFolder(url=absolute_url(out_url), kind=STUDENT_KIND)
        sources = {role: absolute_source(source) for role, source in self.sources.items()}
        table = self._open_table(folder)
        bundles = {source: load(source) for source in dict.fromkeys(sources.values())}
        models = {role: bundles[source] for role, source in sources.items()}
        distillation = self.check(table, models)
        size = image_size_of(table.identity, bundle=models[self.role])
        check_validation(self.settings.validation, size=size)
        identity = self._identity(table, models)
        if (finished := folder.finished(identity)) is not None:
            return finished
        inputs = StudentInputs(
            settings=self.settings,
            sources=sources,
            table_url=table.url,
            table_version=table.version,
            counts=count_rows(table, held_out=self.settings.loader.held_out, branches=self.table.branches),
            identity=identity,
        )
        parents = {self.table.role: table.lineage()} | {
            role: {"source": sources[role], "weights": model.fingerprint()} for role, model in models.items()
        }
        # A worker on this node needs the memory.
        del bundles, models
        folder.begin(identity)
        with read_leases(parents.values(), purpose=f"the training {folder.url}"):
            trained = run_trainings(
                self.factory,
                {"inputs": inputs},
                store_url=folder.store_url,
                settings=self.settings.trainer,
                on_report=on_report,
            )[UNET]
        saved: dict[str, Any] = {"student": sources[self.role], "size": size, "distillation": distillation}
        return folder.publish(
            identity,
            fill=lambda path: {
                "weights": save_student(trained, folder=path, settings=self.settings, **saved),
                "parents": parents,
                "distillation": distillation,
                "seconds": round(time.monotonic() - began, 1),
                **self._metrics(trained),
            },
        )

    def _open_table(self, folder: RunFolder) -> Snapshot:
        version = self.table.version
        if version is None:
            version = folder.pinned_version(self.table.role)
        return open_table(self.table.url, version=version, kind=self.table.kind)

    def _identity(self, table: Snapshot, models: Mapping[str, Bundle]) -> dict[str, Any]:
        """Everything that determines the weights, float sums apart."""
        return {
            "objective": self.objective,
            "settings": self.settings.identity(),
            self.table.role: {"identity": digest(table.identity), "version": table.version},
            **{role: model.describe() for role, model in models.items()},
        }

    def _metrics(self, trained: TrainingResult) -> dict[str, Any]:
        best = trained.best and {
            **next(point for point in trained.validations if point["step"] == trained.best.step),
            "by": self.settings.validation.best,
        }
        return {
            "settings": self.settings.to_values(),
            "evaluation": trained.evaluation,
            "watch": trained.validations,
            "best": best,
            "curve": trained.curve,
            "environment": trained.environment,
        }


def count_rows(table: Snapshot, *, held_out: float, branches: Sequence[bool] = ()) -> Sequence[RowCount]:
    """The training rows of each unit of LATENTS or TARGETS.

    Raises:
        TrainingError: if no row is held out, of one of the `branches` if there are any.
    """
    counts = count_training_rows(table, held_out=held_out)
    units = list(zip(table.units, counts, strict=True))
    for guided in branches or (None,):
        check_held_out(
            table,
            held_out=held_out,
            num_rows=sum(
                unit.rows - total_rows(count)
                for unit, count in units
                if guided is None or is_guided_unit(unit.unit) == guided
            ),
        )
    return counts


def check_held_out(table: Snapshot, *, held_out: float, num_rows: int) -> None:
    """Refuse a table without rows to evaluate on, before workers start.

    Raises:
        TrainingError: if `num_rows`, the number of held-out rows, is 0.
    """
    if not num_rows:
        raise TrainingError(
            f"none of the {table.num_rows} rows of {table.url} is held out for evaluation: raise "
            f"loader.held_out (now {held_out}), or add rows"
        )


def make_training(
    inputs: StudentInputs[Any],
    *,
    role: str,
    bundle: Bundle,
    objective: Objective,
    loader: Loader,
    evaluate: Callable[[], dict[str, Any]],
    steps: int | None = None,
    skips_blocks: bool = False,
) -> Training:
    """The training of a bundle's UNet, in a worker.

    Args:
        inputs: of the worker.
        role: of the model that is trained.
        bundle: the model at its initial weights, on the worker's device.
        objective: to minimise.
        loader: of `inputs.open_table()`.
        evaluate: measures the trained UNet on held-out rows.
        steps: DDIM steps that the student is distilled for, if it is.
        skips_blocks: whether a step may leave blocks of the UNet without a gradient.
    """
    settings, validator = inputs.settings, None
    if settings.validation.every is not None:
        validator = Validator(
            settings.validation,
            every=settings.validation.every,
            model=inputs.sources[role],
            size=image_size_of(inputs.open_table().identity, bundle=bundle),
            steps=steps,
            device=bundle.device,
            threads=settings.trainer.threads_per_worker,
        )
    return Training(
        name=UNET,
        model=bundle.unet,
        objective=objective,
        loader=loader,
        settings=settings.loop,
        identity=dict(inputs.identity),
        evaluate=evaluate,
        validation=validator,
        skips_blocks=skips_blocks,
    )


def prepare_unet(bundle: Bundle, *, settings: UNetTrainingSettings) -> UNet2DConditionModel | BlockUNet:
    """Make the UNet of `bundle` trainable, and return it."""
    unet = bundle.unet.requires_grad_(requires_grad=True)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def save_student(
    trained: TrainingResult,
    *,
    student: str,
    size: int,
    folder: Path,
    settings: UNetTrainingSettings,
    distillation: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Write the folders model, raw and best; returns the SHA-256 of each one's UNet, as it was trained."""
    weights_by_name: dict[str, Mapping[str, torch.Tensor]] = {"model": trained.weights}
    if settings.loop.ema_decay is not None:
        weights_by_name["raw"] = trained.raw_weights
    if trained.best is not None:
        weights_by_name["best"] = trained.best.weights
    hashes = {}
    for name, weights in weights_by_name.items():
        bundle = dataclasses.replace(load(student), prediction_type="v_prediction")
        if WEIGHT_NAME in weights:
            bundle.unet = with_guidance_embedding(bundle.unet)
        bundle.unet.load_state_dict(weights)
        bundle.resize(size)
        hashes[name] = weight_hash(bundle.unet)
        save(bundle, folder / name, dtype=DTYPES[settings.saved_as], distillation=distillation)
        # Only one bundle at a time fits beside the checkpoint.
        del bundle
    return hashes
