"""Step distillation under Ray Train. SnapFusion Sec. 4.2, Eq. 7-11."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from jobs.training.consistency import (
    check_consistency,
    consistency_objective,
    consistency_record,
    held_out_loss,
)
from jobs.training.dmd2 import check_dmd2, check_pairs, dmd2_record, dmd2_training
from jobs.training.metrics import StudentMetrics
from jobs.training.progress_channel import OnReport
from jobs.training.settings import DistillSettings
from jobs.training.spec import Training, TrainingError, first_differences
from jobs.training.student import EVALUATION_STEP, LATENT_COLUMNS, make_training, train_unet
from jobs.training.table_training import TrainingInputs, TrainingTable
from pipelines.datasets.latents import check_latents, without_size
from pipelines.datasets.targets import check_targets
from pipelines.loading.branches import BranchLoader
from pipelines.loading.buckets import BucketLoader, make_loader
from pipelines.loading.loader import BatchLoader
from pipelines.stages.device import DTYPES
from pipelines.tables.table import Snapshot
from snapfusion.models.bundle import Bundle
from snapfusion.models.card import PublishedModel
from snapfusion.models.guidance_embedding import has_guidance_embedding, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets, StoredTargets, TargetSource
from snapfusion.training.loop import AnyObjective
from snapfusion.training.lora import adapted_modules, check_peft
from snapfusion.training.settings import (
    BRANCHES,
    LcmSettings,
    LoraSettings,
    PcmSettings,
    StepDistillationSettings,
)
from snapfusion.training.step_distillation import StepDistillationObjective, is_guided_step

_Loader = BatchLoader | BucketLoader | BranchLoader
_HeldOut = Callable[..., Iterator[Batch]]
_Evaluate = Callable[[nn.Module], dict[str, Any]]


def distill_steps(
    settings: DistillSettings,
    *,
    teacher: str,
    data_url: str,
    out_url: str,
    student: str | None = None,
    base: PublishedModel | None = None,
    on_report: OnReport | None = None,
) -> StudentMetrics:
    """Distil a student and publish it at `out_url` (see `TableTraining.run`).

    Args:
        settings: of the distillation; its sources and its table are given by the other arguments.
        teacher: source of the teacher, which predicts eps or v.
        data_url: URL of LATENTS if the targets are online, else of TARGETS; of PAIRS for DMD's regression.
        out_url: folder to publish.
        student: source of the initial weights, which predict v; None takes the teacher's.
        base: the model that the run begins with, for the model card.
        on_report: receives progress reports; None shows them.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if teacher and student do not go together, or the student does not predict v; or as in
            `TableTraining.run`.
        TableError: if the table does not fit teacher or student.
        TrainingFailed: if workers keep failing.
    """
    online = settings.targets == "online"
    return train_unet(
        settings,
        objective=settings.objective,
        sources={"teacher": teacher, "student": student or teacher},
        role="student",
        table=TrainingTable(
            role="data",
            kind=settings.table_kind,
            url=data_url,
            branches=() if online else _trained_branches(settings.targets_settings),
        ),
        factory=assemble,
        check=partial(_check, settings),
        out_url=out_url,
        base=base,
        on_report=on_report,
    )


def assemble(inputs: TrainingInputs[DistillSettings], *, device: torch.device) -> Iterator[Training]:
    """Assemble the training, in a worker."""
    settings = inputs.settings
    bundle = _initial_student(inputs, device=device)
    captions = CaptionEncoder(bundle)
    if settings.dmd2 is not None:
        yield dmd2_training(inputs, settings.dmd2, bundle=bundle, captions=captions)
        return
    targets = _target_source(inputs, captions=captions, bundle=bundle)
    loader = _loader(inputs)
    held_out = partial(_held_out_batches, loader, settings=settings)
    if settings.consistency is None:
        parts = _step_parts(settings, bundle=bundle, captions=captions, targets=targets, held_out=held_out)
    else:
        parts = _consistency_parts(settings.consistency, bundle=bundle, targets=targets, held_out=held_out)
    objective, evaluate_model = parts

    def evaluate() -> dict[str, Any]:
        before = evaluate_model(_initial_student(inputs, device=device).unet)
        return {"before": before, "after": evaluate_model(bundle.unet)}

    yield make_training(
        inputs,
        role="student",
        bundle=bundle,
        objective=objective,
        loader=loader,
        evaluate=evaluate,
        distillation=_record(settings, schedule=bundle.schedule),
        lora=settings.lora,
    )


def _step_parts(
    settings: DistillSettings,
    *,
    bundle: Bundle,
    captions: CaptionEncoder,
    targets: TargetSource,
    held_out: _HeldOut,
) -> tuple[AnyObjective, _Evaluate]:
    """The objective of step distillation, and the held-out losses of each branch that is trained."""

    def make_objective(
        steps: StepDistillationSettings, *, across_ranks: bool = True
    ) -> StepDistillationObjective:
        return StepDistillationObjective(
            steps,
            targets=targets,
            captions=captions,
            schedule=bundle.schedule,
            seed=settings.loop.seed,
            across_ranks=across_ranks,
        )

    def evaluate_branches(model: nn.Module) -> dict[str, Any]:
        losses = {}
        for guided in _trained_branches(settings.steps):
            # One branch alone, and without L_ori: that would depend on moving averages of earlier steps,
            # which an evaluation has not.
            steps = settings.steps.model_copy(update={"cfg_probability": float(guided), "gamma": 0.0})
            # Only rank 0 evaluates: averages across ranks would wait for the others for ever.
            objective = make_objective(steps, across_ranks=False)
            losses[BRANCHES[guided]] = _evaluate(
                model, objective=objective, batches=held_out(guided=guided), device=bundle.device
            )
        return losses

    return make_objective(settings.steps), evaluate_branches


def _consistency_parts(
    settings: LcmSettings | PcmSettings, *, bundle: Bundle, targets: TargetSource, held_out: _HeldOut
) -> tuple[AnyObjective, _Evaluate]:
    """The objective of a consistency distillation, and the held-out loss of its only branch."""
    objective = consistency_objective(settings, targets=targets, schedule=bundle.schedule)
    (guided,) = _trained_branches(settings.targets)

    def evaluate_branch(model: nn.Module) -> dict[str, Any]:
        batches = held_out(guided=guided)
        loss = held_out_loss(model, objective=objective, batches=batches, device=bundle.device)
        return {BRANCHES[guided]: loss}

    return objective, evaluate_branch


def _initial_student(inputs: TrainingInputs[DistillSettings], *, device: torch.device) -> Bundle:
    bundle = load(inputs.sources["student"], device=str(device))
    if inputs.settings.targets_settings.w_conditioned:
        bundle.unet = with_guidance_embedding(bundle.unet)
    return bundle


def _target_source(
    inputs: TrainingInputs[DistillSettings], *, captions: CaptionEncoder, bundle: Bundle
) -> TargetSource:
    settings = inputs.settings
    if settings.targets == "table":
        return StoredTargets(captions=captions, schedule=bundle.schedule)
    return OnlineTargets(
        load(inputs.sources["teacher"], device=str(bundle.device), dtype=DTYPES[settings.teacher_dtype]),
        captions=captions,
        settings=settings.targets_settings,
        seed=settings.loop.seed,
    )


def _loader(inputs: TrainingInputs[DistillSettings]) -> _Loader:
    seed, steps = inputs.settings.loop.seed, inputs.settings.targets_settings
    if inputs.settings.targets == "online":
        # Both branches read the same rows: the teacher computes either target from a latent.
        return make_loader(columns=LATENT_COLUMNS, **inputs.loading())
    guided = partial(is_guided_step, seed, p=steps.cfg_probability)
    return BranchLoader(guided=guided, **inputs.loading())


def _held_out_batches(loader: _Loader, *, settings: DistillSettings, guided: bool) -> Iterator[Batch]:
    limits = {"rows": settings.trainer.micro_batch, "limit": settings.evaluation_rows}
    if isinstance(loader, BranchLoader):
        return loader.held_out(guided=guided, **limits)
    return loader.held_out(**limits)


def _trained_branches(steps: StepDistillationSettings) -> list[bool]:
    p = steps.cfg_probability
    return [guided for guided, trained in ((False, p < 1.0), (True, p > 0.0)) if trained]


@torch.no_grad()
def _evaluate(
    unet: nn.Module, *, objective: StepDistillationObjective, batches: Iterator[Batch], device: torch.device
) -> dict[str, float]:
    """Losses of one branch on held-out rows (see `StepDistillationObjective.end_step`)."""
    unet.eval()
    for batch in batches:
        objective(unet, batch.to(device), step=EVALUATION_STEP)
    return {
        name.partition("/")[2]: value for name, value in objective.end_step().items() if "gamma" not in name
    }


def _check(settings: DistillSettings, table: Snapshot, models: Mapping[str, Bundle]) -> dict[str, Any]:
    """Refuse models and a table that do not go together; returns the student's distillation record."""
    teacher, student = models["teacher"], models["student"]
    _check_models(teacher=teacher, student=student)
    if settings.dmd2 is not None:
        check_dmd2(settings.dmd2, teacher=teacher, student=student)
    elif settings.consistency is not None:
        check_consistency(settings.consistency, student=student)
    else:
        _check_steps(settings.steps, teacher=teacher, student=student)
    if settings.lora is not None:
        _check_lora(settings, settings.lora, student=student)
    check_table(settings, table=table, teacher=teacher, student=student)
    return _record(settings, schedule=student.schedule)


def _check_steps(steps: StepDistillationSettings, *, teacher: Bundle, student: Bundle) -> None:
    if has_guidance_embedding(student.unet) and not steps.w_conditioned:
        raise TrainingError(
            f"the student {student.source} is w-conditioned, so its guidance is an input and not computed: "
            "set steps.w_conditioned=true"
        )
    steps.check_schedule(teacher.schedule.num_steps)


def _check_lora(settings: DistillSettings, lora: LoraSettings, *, student: Bundle) -> None:
    check_peft()
    adapted_modules(student.unet, lora.modules)
    if settings.targets_settings.w_conditioned and not has_guidance_embedding(student.unet):
        section = "steps" if settings.consistency is None else "consistency"
        raise TrainingError(
            f"{section}.w_conditioned is true, and an adapter cannot hold the input that this adds to "
            f"{student.source}: set it to false"
        )


def _record(settings: DistillSettings, *, schedule: Schedule) -> dict[str, Any]:
    """What the student's folder records of its distillation."""
    if settings.dmd2 is not None:
        return dmd2_record(settings.dmd2, schedule=schedule)
    if settings.consistency is not None:
        return consistency_record(settings.consistency, schedule=schedule)
    steps = settings.steps
    record = {
        "steps": steps.student_steps,
        "timesteps": list(time_grid(steps.student_steps, schedule_steps=schedule.num_steps)[:-1]),
        "teacher_steps": steps.k * steps.student_steps,
        "cfg_probability": steps.cfg_probability,
        "w_conditioned": steps.w_conditioned,
    }
    return record | ({"cfg_range": steps.cfg_range.to_values()} if steps.cfg_probability else {})


def _check_models(*, teacher: Bundle, student: Bundle) -> None:
    if student.prediction_type != "v_prediction":
        raise TrainingError(
            f"the student {student.source} predicts eps, and step distillation needs v: fine-tune it with "
            "jobs.finetune_vpred, or name another student"
        )
    if teacher.fingerprint()["text_encoder"] != student.fingerprint()["text_encoder"]:
        raise TrainingError(
            f"{teacher.source} cannot teach {student.source}: its text encoder differs, so a caption has "
            "another embedding for each of them, which made SD-v2 a bad teacher of SD-v1.5 (App. D); name a "
            "teacher with the student's text encoder"
        )
    if differing := first_differences(_shared_parts(teacher), _shared_parts(student)):
        raise TrainingError(
            f"{teacher.source} cannot teach {student.source}: VAE, scaling factor and schedule must agree: "
            f"{differing} (there: the teacher, here: the student)"
        )


def _shared_parts(bundle: Bundle) -> dict[str, Any]:
    """Parts that teacher and student must have in common, beside the text encoder."""
    model = without_size(bundle.describe())
    shared = {name: model[name] for name in ("scaling_factor", "latent_shape", "schedule")}
    return {"weights": {"vae": model["weights"]["vae"]}, **shared}


def check_table(settings: DistillSettings, *, table: Snapshot, teacher: Bundle, student: Bundle) -> None:
    """Refuse LATENTS of other models, PAIRS of other models or guidance, or TARGETS of other models or steps.

    Raises:
        TableError: naming what differs.
    """
    if settings.dmd2 is not None and settings.dmd2.reads_pairs:
        check_pairs(table, settings=settings.dmd2, teacher=teacher)
    elif settings.targets == "online":
        check_latents(table, bundle=student)
    else:
        check_targets(
            table,
            teacher=teacher.describe(),
            student=student.describe(),
            steps=settings.targets_settings,
        )


def summary(metrics: StudentMetrics) -> list[str]:
    """Lines with the held-out losses, before and after."""
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    return [
        f"{metrics['distillation']['steps']} steps, {branch}: held-out distillation loss "
        f"{before[branch]['loss']:.5f} before, {after[branch]['loss']:.5f} after"
        for branch in after
    ]
