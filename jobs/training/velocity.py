"""Trains UNets by the velocity loss: eps to v, robust and efficient models. SnapFusion Eq. 5, 6."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from jobs.training.metrics import StudentMetrics
from jobs.training.progress_channel import OnReport
from jobs.training.settings import VpredSettings
from jobs.training.spec import Training, TrainingError
from jobs.training.student import EVALUATION_STEP, LATENT_COLUMNS, make_training, train_unet
from jobs.training.table_training import TrainingInputs, TrainingTable, count_rows
from jobs.training.validation import check_validation
from pipelines.datasets.latents import check_latents, image_size_of
from pipelines.tables.table import Snapshot
from snapfusion.models.blocks import set_skipped_blocks
from snapfusion.models.bundle import Bundle
from snapfusion.models.card import PublishedModel
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.loop import Objective
from snapfusion.training.robust import RobustObjective
from snapfusion.training.velocity import VelocityObjective


def finetune_vpred(
    settings: VpredSettings,
    *,
    model: str,
    latents_url: str,
    out_url: str,
    further: bool = False,
    base: PublishedModel | None = None,
    table_sources: Callable[[], Sequence[str]] | None = None,
    on_report: OnReport | None = None,
) -> StudentMetrics:
    """Train a model by L_ori and publish it at `out_url` (see `TableTraining.run`).

    Args:
        settings: of the training.
        model: source of the initial weights, which predict eps.
        latents_url: URL of LATENTS.
        out_url: folder to publish.
        further: also accept a model that predicts v already.
        base: the model that the run begins with, for the model card.
        table_sources: gives the sources of LATENTS in their order, for `settings.follow`.
        on_report: receives progress reports; None shows them.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if the model predicts v already and `further` is not set; or as in
            `TableTraining.run`.
        TableError: if LATENTS do not fit the model.
        TrainingFailed: if workers keep failing.
        TableStalled: if LATENTS that are followed do not grow while the training waits for them.
    """

    def check(latents: Snapshot, models: Mapping[str, Bundle]) -> None:
        if models["model"].prediction_type == "v_prediction" and not further:
            raise TrainingError(f"{model} predicts v already; there is nothing to fine-tune")
        check_latents(latents, bundle=models["model"])

    return train_unet(
        settings,
        objective="velocity",
        sources={"model": model},
        role="model",
        table=TrainingTable(role="latents", kind="latents", url=latents_url, sources=table_sources),
        factory=assemble,
        check=check,
        out_url=out_url,
        base=base,
        on_report=on_report,
    )


def check_training(settings: VpredSettings, *, bundle: Bundle, latents: Snapshot) -> None:
    """Refuse a model that could not be trained or validated on these LATENTS.

    Raises:
        TableError: if LATENTS do not fit the model.
        TrainingError: if no row is held out, or validation is not possible as the settings say.
    """
    check_latents(latents, bundle=bundle)
    check_validation(settings.validation, size=image_size_of(latents.identity, bundle=bundle))
    count_rows(latents, held_out=settings.loader.held_out)


def assemble(inputs: TrainingInputs[VpredSettings], *, device: torch.device) -> Iterator[Training]:
    """Assemble the training, in a worker."""
    settings = inputs.settings
    bundle = load(inputs.sources["model"], device=str(device))
    velocity = VelocityObjective(
        settings.velocity, captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=settings.loop.seed
    )
    objective: Objective = velocity
    if settings.skip is not None:
        objective = RobustObjective(velocity, settings=settings.skip, seed=settings.loop.seed)
    loader = inputs.loader(LATENT_COLUMNS)
    held_out = partial(loader.held_out, rows=settings.trainer.micro_batch, limit=settings.evaluation_rows)
    yield make_training(
        inputs,
        role="model",
        bundle=bundle,
        objective=objective,
        loader=loader,
        evaluate=lambda: _evaluate(bundle, objective=velocity, batches=held_out()),
        skips_blocks=settings.skip is not None,
    )


@torch.no_grad()
def _evaluate(bundle: Bundle, *, objective: VelocityObjective, batches: Iterator[Batch]) -> dict[str, Any]:
    """L_ori of the whole UNet on held-out rows."""
    unet = bundle.unet.eval()
    # The last training step may have left blocks skipped.
    set_skipped_blocks(unet, ())
    losses = torch.cat([objective(unet, batch.to(bundle.device), step=EVALUATION_STEP) for batch in batches])
    return {"rows": len(losses), "loss": float(losses.mean())}
