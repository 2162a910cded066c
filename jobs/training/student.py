"""Trains a UNet on a table and publishes it as diffusers folders.

OUT/model/          the student, with averaged weights if an average is kept
OUT/raw/            then also the student with its last weights
OUT/best/           if it was validated, the student with the best weights
OUT/watch/          then also an image grid of each validation
OUT/logs/           the training's logs, for TensorBoard
OUT/metrics.json    parents, settings, training curve and evaluation
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from jobs.training.metrics import StudentMetrics
from jobs.training.progress_channel import OnReport
from jobs.training.settings import UNetTrainingSettings
from jobs.training.spec import Loader, Training, TrainingFactory
from jobs.training.table_training import TableTraining, TrainingInputs, TrainingTable
from jobs.training.trainer import TrainingResult
from jobs.training.validation import Validator, check_validation, load_weights
from pipelines.datasets.latents import image_size_of
from pipelines.stages.device import DTYPES
from pipelines.tables.table import Snapshot
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.card import Provenance, PublishedModel
from snapfusion.models.load import load
from snapfusion.models.lora_files import write_lora
from snapfusion.models.save import save
from snapfusion.training.loop import AnyObjective
from snapfusion.training.lora import LoraUNet, is_lora_state, lora_weights
from snapfusion.training.settings import LoraSettings, NetworkSettings

UNET = "unet"
"""Name of the training, and so of its checkpoint store."""

ADAPTER = "lora"
"""Folder of the adapter that a training published."""

EVALUATION_STEP = -1
"""Step number of the evaluation's random draws: one that training never takes."""

SettingsT = TypeVar("SettingsT", bound=UNetTrainingSettings)

LATENT_COLUMNS = ("latent", "token_ids")
"""Columns of LATENTS that a training reads."""


def train_unet(
    settings: SettingsT,
    *,
    objective: str,
    sources: Mapping[str, str],
    role: str,
    table: TrainingTable,
    factory: TrainingFactory,
    check: Callable[[Snapshot, Mapping[str, Bundle]], Mapping[str, Any] | None],
    out_url: str,
    base: PublishedModel | None,
    on_report: OnReport | None,
) -> StudentMetrics:
    """Train a UNet to predict v and publish it (see `TableTraining.run`).

    Args:
        settings: of the training.
        objective: its name in the identity.
        sources: model sources by role.
        role: of the model whose UNet is trained; the rest of the student is taken from it unchanged.
        table: to train on.
        factory: assembles one training, named `UNET`.
        check: refuses a table and models that do not go together; returns what the student's folder records
            of the steps that it was distilled for, if any.
        out_url: folder to publish.
        base: the model that the run begins with, for the model card.
        on_report: receives progress reports; None shows them.
    """

    def check_with_validation(table: Snapshot, models: Mapping[str, Bundle]) -> dict[str, Any]:
        distillation = check(table, models)
        size = image_size_of(table.identity, bundle=models[role])
        check_validation(settings.validation, size=size)
        return {"size": size, "distillation": distillation}

    metrics: StudentMetrics = TableTraining(
        kind="student",
        settings=settings,
        sources=sources,
        table=table,
        factory=factory,
        check=check_with_validation,
        identity=lambda models: {
            "objective": objective,
            **{name: model.describe() for name, model in models.items()},
        },
        publish=partial(_publish, role, table.role, base),
    ).run(out_url, on_report=on_report)
    return metrics


def _publish(
    role: str,
    table_role: str,
    base: PublishedModel | None,
    path: Path,
    results: Mapping[str, TrainingResult],
    inputs: TrainingInputs[SettingsT],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the student's folders; returns its metrics."""
    trained, settings = results[UNET], inputs.settings
    best = trained.best and {
        **next(point for point in trained.validations if point["step"] == trained.best.step),
        "by": settings.validation.best,
    }
    return {
        "weights": save_student(
            trained,
            student=inputs.sources[role],
            folder=path,
            settings=settings,
            provenance=_provenance(inputs, table_role=table_role, base=base),
            **saved,
        ),
        "distillation": saved["distillation"],
        "evaluation": trained.evaluation,
        "watch": trained.validations,
        "best": best,
        "curve": trained.curve,
        "environment": trained.environment,
    }


def _provenance(inputs: TrainingInputs[Any], *, table_role: str, base: PublishedModel | None) -> Provenance:
    identity = inputs.identity
    return Provenance(
        objective=identity["objective"],
        models={role: (source, identity[role]["weights"]["unet"]) for role, source in inputs.sources.items()},
        table=(identity[table_role]["identity"], identity[table_role]["version"]),
        base=base,
    )


def make_training(
    inputs: TrainingInputs[Any],
    *,
    role: str,
    bundle: Bundle,
    objective: AnyObjective,
    loader: Loader,
    evaluate: Callable[[], dict[str, Any]],
    distillation: Mapping[str, Any] | None = None,
    skips_blocks: bool = False,
    others: Mapping[str, tuple[nn.Module, NetworkSettings]] | None = None,
    lora: LoraSettings | None = None,
) -> Training:
    """The training of a bundle's UNet, in a worker.

    Args:
        inputs: of the worker.
        role: of the model that is trained.
        bundle: the model at its initial weights, on the worker's device.
        objective: to minimise.
        loader: of `inputs.table`.
        evaluate: measures the trained UNet on held-out rows.
        distillation: what the student's folder records of its distillation, if it is distilled.
        skips_blocks: whether a step may leave blocks of the UNet without a gradient.
        others: networks that are trained beside the UNet (see `Training`).
        lora: of an adapter that is trained in place of all weights.
    """
    settings, validator = inputs.settings, None
    if settings.gradient_checkpointing:
        bundle.unet.enable_gradient_checkpointing()
    if settings.validation.every is not None:
        validator = Validator(
            settings=settings.validation,
            every=settings.validation.every,
            model=inputs.sources[role],
            size=image_size_of(inputs.table.identity, bundle=bundle),
            distillation=distillation,
            device=bundle.device,
            threads=settings.trainer.threads_per_worker,
        )
    return Training(
        name=UNET,
        model=_trained(bundle.unet, lora=lora, seed=settings.loop.seed),
        objective=objective,
        loader=loader,
        settings=settings.loop,
        identity=dict(inputs.identity),
        evaluate=evaluate,
        validation=validator,
        skips_blocks=skips_blocks,
        others=others or {},
    )


def _trained(unet: nn.Module, *, lora: LoraSettings | None, seed: int) -> nn.Module:
    """The UNet, whose weights are no longer frozen, or an adapter in it."""
    if lora is not None:
        return LoraUNet(unet, lora, seed=seed)
    # A loaded bundle's networks are frozen.
    return unet.requires_grad_(requires_grad=True)


def save_student(
    trained: TrainingResult,
    *,
    student: str,
    size: int,
    folder: Path,
    settings: UNetTrainingSettings,
    distillation: Mapping[str, Any] | None,
    provenance: Provenance | None = None,
) -> dict[str, str]:
    """Write the folders model, raw and best; returns the SHA-256 of each one's UNet, as it was trained.

    A trained adapter is merged into each, and written beside it.
    """
    weights_by_name: dict[str, Mapping[str, torch.Tensor]] = {"model": trained.weights}
    if settings.loop.ema_decay is not None:
        weights_by_name["raw"] = trained.raw_weights
    if trained.best is not None:
        weights_by_name["best"] = trained.best.weights
    hashes = {}
    for name, weights in weights_by_name.items():
        bundle = dataclasses.replace(load(student), prediction_type="v_prediction")
        load_weights(bundle, weights)
        if is_lora_state(weights):
            _write_adapter(
                weights, folder / _adapter_folder(name), settings=settings, distillation=distillation
            )
        bundle.resize(size)
        # Of the weights as trained, before they are saved in another dtype.
        hashes[name] = weight_hash(bundle.unet)
        save(
            bundle,
            folder / name,
            dtype=DTYPES[settings.saved_as],
            distillation=distillation,
            provenance=provenance,
        )
        # Only one bundle at a time fits beside the checkpoint.
        del bundle
    return hashes


def _adapter_folder(name: str) -> str:
    """The folder of the adapter that is merged into a folder's model."""
    return ADAPTER if name == "model" else f"{ADAPTER}-{name}"


def _write_adapter(
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    settings: UNetTrainingSettings,
    distillation: Mapping[str, Any] | None,
) -> None:
    """Write an adapter with what a model needs for it: how it is then sampled, and that it predicts v."""
    record = None if distillation is None else {**distillation, "prediction_type": "v_prediction"}
    write_lora(folder, lora_weights(weights), dtype=DTYPES[settings.saved_as], distillation=record)
