"""Step distillation under Ray Train. SnapFusion Sec. 4.2, Eq. 7-11."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import DistillSettings
from jobs.training.spec import Training, TrainingError
from jobs.training.student import (
    DTYPES,
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
from pipelines.datasets.latents import check_latents, image_size_of, without_size
from pipelines.datasets.targets import check_targets
from pipelines.loading.branches import BranchLoader
from pipelines.loading.buckets import BucketLoader, RowCount, count_training_rows, make_loader
from pipelines.loading.loader import BatchLoader
from pipelines.storage.objects import absolute_url
from pipelines.tables.table import Snapshot, open_table
from snapfusion.models.bundle import Bundle
from snapfusion.models.guidance_embedding import has_guidance_embedding, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.sampling import time_grid
from snapfusion.settings import differences
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets, StoredTargets, TargetSource
from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.step_distillation import BRANCHES, StepDistillationObjective, is_guided_step

_COLUMNS = ("latent", "token_ids")


_EVALUATION_STEP = -1
"""The step whose draws the evaluation takes: none that training takes."""


def distill_steps(
    settings: DistillSettings,
    *,
    teacher: str,
    data_url: str,
    out_url: str,
    student: str | None = None,
    data_version: int | None = None,
    on_report: OnReport = lambda figures: None,
) -> dict[str, Any]:
    """Distil the student and publish it at `out_url`, whole or not at all (`jobs.training.student` shows its files).

    A run that was killed goes on where it stood, with the version of the table that it began with; a folder
    that is published is left as it is.

    Args:
        settings: how; where its models and its folder lie is said by the other arguments.
        teacher: a source that `snapfusion.models.load` accepts; it may predict eps or v.
        data_url: of LATENTS where the targets are online, else of TARGETS.
        out_url: of the folder to make.
        student: the source of the first weights, which predict v; None takes the teacher's.
        data_version: of the table; None takes what the run began with, or else the newest.
        on_report: told of the training's progress.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if teacher and student do not go together, the student does not predict v, `out_url`
            holds or has begun something else, or training cannot end.
        TableError: if the table does not fit teacher or student.
        TrainingFailed: if workers keep failing.
    """
    result, teacher = RunFolder(url=absolute_url(out_url), kind=STUDENT_KIND), absolute_source(teacher)
    student = teacher if student is None else absolute_source(student)
    pinned = result.pinned_version("data") if data_version is None else data_version
    kind = "latents" if settings.targets == "online" else "targets"
    table = open_table(data_url, version=pinned, kind=kind)
    bundle = load(teacher)
    models = {"teacher": bundle, "student": bundle if student == teacher else load(student)}
    _check_models(**models)
    if has_guidance_embedding(models["student"].unet) and not settings.steps.w_conditioned:
        raise TrainingError(
            f"the student {student} is told w, so it has no guidance of its own: set steps.w_conditioned"
        )
    _check_time_grid(settings.steps, teacher=models["teacher"])
    _check_table(settings, table=table, **models)
    size = image_size_of(table.identity, bundle=models["student"])
    check_validation(settings.watch, size=size)
    identity = {
        "objective": "steps",
        "settings": settings.deciding(without=("name", "teacher", "student", "table")),
        **{role: bundle.describe() for role, bundle in models.items()},
        "data": table_identity(table),
    }
    finished = result.finished(identity)
    if finished is not None:
        return finished
    counts = count_training_rows(table, held_out=settings.loader.held_out)
    for guided in _trained_branches(settings.steps):
        found = next(
            _held_out_batches(_loader(settings, table=table, counts=counts), guided=guided, rows=1, limit=1),
            None,
        )
        check_held_out(found, settings=settings, table=table)
    weights = {role: bundle.fingerprint() for role, bundle in models.items()}
    distillation = _sampling_record(settings.steps, bundle=models["student"])
    del bundle, models  # a worker beside this process needs the memory
    return train_student(
        settings,
        result=result,
        program=assemble,
        arguments={
            "teacher": teacher,
            "student": student,
            "data_url": table.url,
            "data_version": table.version,
            "counts": counts,
        },
        identity=identity,
        parents={
            "data": table.lineage(),
            "teacher": {"source": teacher, "weights": weights["teacher"]},
            "student": {"source": student, "weights": weights["student"]},
        },
        student=student,
        size=size,
        distillation=distillation,
        on_report=on_report,
    )


def assemble(
    *,
    settings: DistillSettings,
    teacher: str,
    student: str,
    data_url: str,
    data_version: int,
    counts: Sequence[RowCount],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Training]:
    """The training, in a worker."""
    bundle = _initial_student(settings, student=student, device=device)
    unet, captions = trainable_unet(bundle, settings=settings), CaptionEncoder(bundle)
    targets = _target_source(settings, teacher=teacher, captions=captions, bundle=bundle)

    def objective_of(steps: StepDistillationSettings, *, across_ranks: bool) -> StepDistillationObjective:
        return StepDistillationObjective(
            steps,
            targets=targets,
            captions=captions,
            schedule=bundle.schedule,
            seed=settings.loop.seed,
            across_ranks=across_ranks,
        )

    table = open_table(data_url, version=data_version)
    loader = _loader(settings, table=table, counts=counts)

    def figures(model: nn.Module) -> dict[str, Any]:
        return {
            BRANCHES[guided]: _evaluate(
                model,
                objective=objective_of(_single_branch(settings.steps, guided=guided), across_ranks=False),
                batches=_held_out_batches(
                    loader,
                    guided=guided,
                    rows=settings.trainer.micro_batch,
                    limit=settings.evaluation_rows,
                ),
                device=device,
            )
            for guided in _trained_branches(settings.steps)
        }

    def evaluate() -> dict[str, Any]:
        before = figures(_initial_student(settings, student=student, device=device).unet)
        return {"before": before, "after": figures(unet)}

    yield Training(
        name=UNET,
        model=unet,
        objective=objective_of(settings.steps, across_ranks=True),
        loader=loader,
        settings=settings.loop,
        identity=dict(identity),
        evaluate=evaluate,
        watch=make_validator(
            settings,
            student=student,
            size=image_size_of(table.identity, bundle=bundle),
            steps=settings.steps.student_steps,
            device=device,
        ),
    )


def _initial_student(settings: DistillSettings, *, student: str, device: torch.device) -> Bundle:
    """The student at its first weights."""
    bundle = load(student, device=str(device))
    if settings.steps.w_conditioned:
        bundle.unet = with_guidance_embedding(bundle.unet)
    return bundle


def _target_source(
    settings: DistillSettings, *, teacher: str, captions: CaptionEncoder, bundle: Bundle
) -> TargetSource:
    if settings.targets == "table":
        return StoredTargets(captions=captions, schedule=bundle.schedule)
    return OnlineTargets(
        load(teacher, device=str(bundle.device), dtype=DTYPES[settings.teacher_dtype]),
        captions=captions,
        settings=settings.steps,
        seed=settings.loop.seed,
    )


def _loader(
    settings: DistillSettings, *, table: Snapshot, counts: Sequence[RowCount]
) -> BatchLoader | BucketLoader | BranchLoader:
    shared: dict[str, Any] = {
        "global_batch": settings.loop.global_batch,
        "seed": settings.loop.seed,
        "settings": settings.loader,
        "counts": counts,
    }
    if settings.targets == "online":
        return make_loader(table, columns=_COLUMNS, **shared)
    return BranchLoader(table, guided=partial(_is_guided, settings), **shared)


def _is_guided(settings: DistillSettings, step: int) -> bool:
    return is_guided_step(settings.loop.seed, step, settings.steps.cfg_probability)


def _held_out_batches(
    loader: BatchLoader | BucketLoader | BranchLoader, *, guided: bool, rows: int, limit: int
) -> Iterator[Batch]:
    if isinstance(loader, BranchLoader):
        return loader.held_out(guided=guided, rows=rows, limit=limit)
    return loader.held_out(rows=rows, limit=limit)


def _trained_branches(steps: StepDistillationSettings) -> list[bool]:
    """The branches that training takes."""
    p = steps.cfg_probability
    return [guided for guided, taken in ((False, p < 1.0), (True, p > 0.0)) if taken]


def _single_branch(steps: StepDistillationSettings, *, guided: bool) -> StepDistillationSettings:
    """One branch, without the original loss."""
    return steps.model_copy(update={"cfg_probability": float(guided), "gamma": 0.0})


@torch.no_grad()
def _evaluate(
    unet: nn.Module, *, objective: StepDistillationObjective, batches: Iterator[Batch], device: torch.device
) -> dict[str, float]:
    """The figures of one branch on the held-out rows (see `StepDistillationObjective.end_step`)."""
    unet.eval()
    for batch in batches:
        objective(unet, batch.to(device), step=_EVALUATION_STEP)
    return {
        name.partition("/")[2]: value for name, value in objective.end_step().items() if "gamma" not in name
    }


def _sampling_record(steps: StepDistillationSettings, *, bundle: Bundle) -> dict[str, Any]:
    """What a student's folder says of how it is to be sampled."""
    times = time_grid(steps.student_steps, schedule_steps=bundle.schedule.num_steps)
    guided = {"cfg_range": steps.cfg_range.to_values()} if steps.cfg_probability else {}
    return {
        "steps": steps.student_steps,
        "timesteps": list(times[:-1]),
        "teacher_steps": steps.k * steps.student_steps,
        "cfg_probability": steps.cfg_probability,
        "w_conditioned": steps.w_conditioned,
        **guided,
    }


def _check_models(*, teacher: Bundle, student: Bundle) -> None:
    """Refuse a student that predicts eps, or reads other latents, times or captions than its teacher."""
    if student.prediction_type != "v_prediction":
        raise TrainingError(
            f"the student {student.source} predicts eps, and step distillation needs v: make it a v model "
            "with jobs.finetune_vpred, or name another student"
        )
    if teacher.fingerprint()["text_encoder"] != student.fingerprint()["text_encoder"]:
        raise TrainingError(
            f"{teacher.source} cannot teach {student.source}: its text encoder is another, so a caption "
            "reaches the two as different embeddings, which made SD-v2 a bad teacher of SD-v1.5 (App. D); "
            "take a teacher with the student's text encoder"
        )
    differing = list(differences(_shared_parts(teacher), _shared_parts(student)))
    if differing:
        raise TrainingError(
            f"{teacher.source} cannot teach {student.source}, with which it must share VAE, scale and "
            f"schedule: {'; '.join(differing[:3])} (there: the teacher, here: the student)"
        )


def _shared_parts(bundle: Bundle) -> dict[str, Any]:
    model = without_size(bundle.describe())
    shared = {name: model[name] for name in ("scaling_factor", "latent_shape", "schedule")}
    return {"weights": {"vae": model["weights"]["vae"]}, **shared}


def _check_time_grid(steps: StepDistillationSettings, *, teacher: Bundle) -> None:
    try:
        time_grid(steps.k * steps.student_steps, schedule_steps=teacher.schedule.num_steps)
    except ValueError:
        raise TrainingError(
            f"steps.k {steps.k} times steps.student_steps {steps.student_steps} is more than the schedule's "
            f"{teacher.schedule.num_steps} steps"
        ) from None


def _check_table(settings: DistillSettings, *, table: Snapshot, teacher: Bundle, student: Bundle) -> None:
    if settings.targets == "online":
        check_latents(table, bundle=student)
        return
    steps = settings.steps
    check_targets(
        table,
        teacher=teacher.describe(),
        student=student.describe(),
        student_steps=steps.student_steps,
        k=steps.k,
        cfg_range=steps.cfg_range,
        cfg_probability=steps.cfg_probability,
        caption_dropout=steps.caption_dropout,
    )


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The figures that matter, in words."""
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    return [
        f"{metrics['distillation']['steps']} steps, {branch}: held-out distillation loss "
        f"{before[branch]['loss']:.5f} at first, {after[branch]['loss']:.5f} at last"
        for branch in after
    ]
