"""Distil a student that takes fewer steps than its teacher. SnapFusion Sec. 4.2, Eq. 7-11.

Targets come from the teacher in the trainer (on LATENTS), or from the table TARGETS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from jobs.exits import leave
from jobs.reports import OnReport, show_reports
from jobs.result import METRICS, Result
from jobs.student import (
    DTYPES,
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
from pipelines.branches import BranchLoader
from pipelines.buckets import BucketLoader, Count, count_rows, loader_of
from pipelines.latents import any_size, check_latents, size_of
from pipelines.loader import BatchLoader
from pipelines.storage import absolute, exists
from pipelines.tables import Snapshot, open_table
from pipelines.targets import check_fit
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.told import is_told, told
from snapfusion.sampling import time_grid
from snapfusion.settings import differences
from snapfusion.training.batch import Batch
from snapfusion.training.captions import Captions
from snapfusion.training.lessons import Lessons, OnlineLessons, StoredLessons
from snapfusion.training.loop import LoopSettings
from snapfusion.training.steps import BRANCHES, StepsObjective, StepsSettings, guided_step

if TYPE_CHECKING:
    from jobs.cli import Job

_COLUMNS = ("latent", "token_ids")
_EVALUATION = -1
"""The step whose draws the evaluation takes: none that training takes."""


class DistillSettings(StudentTraining):
    """How a student is distilled. The defaults are the miniature's.

    Attributes:
        name: of the student's folder in the run.
        teacher: its source, or "run:" and a place in the run; null takes the run's v model, or else the
            recipe's model.
        student: the source of its first weights, likewise; null takes the teacher's.
        table: URL of the table that rows are read from, or "run:" and a place in the run; null takes the
            run's `latents`, or `targets`.
        targets: "online", from the teacher in the trainer, or from the "table" TARGETS.
        teacher_dtype: of the teacher in the trainer.
        steps: what is learnt.
        loop: the optimizer's settings.
    """

    name: str = Field("student-8", pattern=r"^[A-Za-z0-9_.-]+$")
    teacher: str | None = None
    student: str | None = None
    table: str | None = None
    targets: Literal["online", "table"] = "online"
    teacher_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: StepsSettings = StepsSettings()
    loop: LoopSettings = LoopSettings(
        num_steps=400, global_batch=64, learning_rate=4e-4, warmup_steps=20, ema_decay=0.99
    )


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
    """Distil the student and publish it at `out_url`, whole or not at all (`jobs.student` shows its files).

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
    result, teacher = Result(url=absolute(out_url), kind=KIND), placed(teacher)
    student = teacher if student is None else placed(student)
    pinned = result.pinned_version("data") if data_version is None else data_version
    kind = "latents" if settings.targets == "online" else "targets"
    table = open_table(data_url, version=pinned, kind=kind)
    bundle = load(teacher)
    models = {"teacher": bundle, "student": bundle if student == teacher else load(student)}
    _check_models(**models)
    if is_told(models["student"].unet) and not settings.steps.w_conditioned:
        raise TrainingError(
            f"the student {student} is told w, so it has no guidance of its own: set steps.w_conditioned"
        )
    _check_grid(settings.steps, teacher=models["teacher"])
    _check_table(settings, table=table, **models)
    size = size_of(table.identity, bundle=models["student"])
    check_watch(settings.watch, size=size)
    identity = {
        "objective": "steps",
        "settings": settings.deciding(without=("name", "teacher", "student", "table")),
        **{role: bundle.describe() for role, bundle in models.items()},
        "data": table_identity(table),
    }
    finished = result.finished(identity)
    if finished is not None:
        return finished
    counts = count_rows(table, held_out=settings.loader.held_out)
    for guided in _branches(settings.steps):
        found = next(
            _held_out(_loader(settings, table=table, counts=counts), guided=guided, rows=1, limit=1), None
        )
        check_held_out(found, settings=settings, table=table)
    weights = {role: bundle.fingerprint() for role, bundle in models.items()}
    distillation = _distillation(settings.steps, bundle=models["student"])
    del bundle, models  # a worker beside this process needs the memory
    return make_student(
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
    counts: Sequence[Count],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Training]:
    """The training, in a worker."""
    bundle = _first(settings, student=student, device=device)
    unet, captions = trainable_unet(bundle, settings=settings), Captions(bundle)
    lessons = _lessons(settings, teacher=teacher, captions=captions, bundle=bundle)

    def objective_of(steps: StepsSettings, *, across_ranks: bool) -> StepsObjective:
        return StepsObjective(
            steps,
            lessons=lessons,
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
                objective=objective_of(_alone(settings.steps, guided=guided), across_ranks=False),
                batches=_held_out(
                    loader,
                    guided=guided,
                    rows=settings.trainer.micro_batch,
                    limit=settings.evaluation_rows,
                ),
                device=device,
            )
            for guided in _branches(settings.steps)
        }

    def evaluate() -> dict[str, Any]:
        before = figures(_first(settings, student=student, device=device).unet)
        return {"before": before, "after": figures(unet)}

    yield Training(
        name=UNET,
        model=unet,
        objective=objective_of(settings.steps, across_ranks=True),
        loader=loader,
        settings=settings.loop,
        identity=dict(identity),
        evaluate=evaluate,
        watch=watcher(
            settings,
            student=student,
            size=size_of(table.identity, bundle=bundle),
            steps=settings.steps.student_steps,
            device=device,
        ),
    )


def _first(settings: DistillSettings, *, student: str, device: torch.device) -> Bundle:
    """The student at its first weights."""
    bundle = load(student, device=str(device))
    if settings.steps.w_conditioned:
        bundle.unet = told(bundle.unet)
    return bundle


def _lessons(settings: DistillSettings, *, teacher: str, captions: Captions, bundle: Bundle) -> Lessons:
    if settings.targets == "table":
        return StoredLessons(captions=captions, schedule=bundle.schedule)
    steps = settings.steps
    return OnlineLessons(
        load(teacher, device=str(bundle.device), dtype=DTYPES[settings.teacher_dtype]),
        captions=captions,
        student_steps=steps.student_steps,
        k=steps.k,
        cfg_range=steps.cfg_range,
        caption_dropout=steps.caption_dropout,
        seed=settings.loop.seed,
    )


def _loader(
    settings: DistillSettings, *, table: Snapshot, counts: Sequence[Count]
) -> BatchLoader | BucketLoader | BranchLoader:
    shared: dict[str, Any] = {
        "global_batch": settings.loop.global_batch,
        "seed": settings.loop.seed,
        "settings": settings.loader,
        "counts": counts,
    }
    if settings.targets == "online":
        return loader_of(table, columns=_COLUMNS, **shared)
    return BranchLoader(table, guided=partial(_is_guided, settings), **shared)


def _is_guided(settings: DistillSettings, step: int) -> bool:
    return guided_step(settings.loop.seed, step, settings.steps.cfg_probability)


def _held_out(
    loader: BatchLoader | BucketLoader | BranchLoader, *, guided: bool, rows: int, limit: int
) -> Iterator[Batch]:
    if isinstance(loader, BranchLoader):
        return loader.held_out(guided=guided, rows=rows, limit=limit)
    return loader.held_out(rows=rows, limit=limit)


def _branches(steps: StepsSettings) -> list[bool]:
    """The branches that training takes."""
    p = steps.cfg_probability
    return [guided for guided, taken in ((False, p < 1.0), (True, p > 0.0)) if taken]


def _alone(steps: StepsSettings, *, guided: bool) -> StepsSettings:
    """One branch, without the original loss."""
    return steps.model_copy(update={"cfg_probability": float(guided), "gamma": 0.0})


@torch.no_grad()
def _evaluate(
    unet: nn.Module, *, objective: StepsObjective, batches: Iterator[Batch], device: torch.device
) -> dict[str, float]:
    """The figures of one branch on the held-out rows (see `StepsObjective.end_step`)."""
    unet.eval()
    for batch in batches:
        objective(unet, batch.to(device), step=_EVALUATION)
    return {
        name.partition("/")[2]: value for name, value in objective.end_step().items() if "gamma" not in name
    }


def _distillation(steps: StepsSettings, *, bundle: Bundle) -> dict[str, Any]:
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
    differing = list(differences(_shared(teacher), _shared(student)))
    if differing:
        raise TrainingError(
            f"{teacher.source} cannot teach {student.source}, with which it must share VAE, scale and "
            f"schedule: {'; '.join(differing[:3])} (there: the teacher, here: the student)"
        )


def _shared(bundle: Bundle) -> dict[str, Any]:
    model = any_size(bundle.describe())
    shared = {name: model[name] for name in ("scaling_factor", "latent_shape", "schedule")}
    return {"weights": {"vae": model["weights"]["vae"]}, **shared}


def _check_grid(steps: StepsSettings, *, teacher: Bundle) -> None:
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
    check_fit(
        table,
        teacher=teacher.describe(),
        student=student.describe(),
        student_steps=steps.student_steps,
        k=steps.k,
        cfg_range=steps.cfg_range,
        cfg_probability=steps.cfg_probability,
        caption_dropout=steps.caption_dropout,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_steps`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("distill_steps", distill, preview=preview, about=__doc__, argv=argv)


def distill(job: Job) -> None:
    """Make the run's student; one that is there already is left as it is."""
    from jobs.cluster import connect

    settings = job.recipe.distill
    place = job.place(settings.name)
    if not exists(f"{place}/{METRICS}"):
        connect(job.recipe.cluster)
    teacher, student = sources(job)
    metrics = distill_steps(
        settings.model_copy(update={"watch": in_run(settings.watch, job)}),
        teacher=teacher,
        student=student,
        data_url=data_url(job),
        out_url=place,
        on_report=show_reports(),
    )
    for line in summary(metrics):
        print(f"  {line}")


def sources(job: Job) -> tuple[str, str]:
    """Where the teacher and the student's first weights are."""
    settings = job.recipe.distill
    made = exists(job.place(f"vpred/{METRICS}"))
    default = "run:vpred/model" if made else job.recipe.model
    teacher = settings.teacher or default
    return job.source(teacher), job.source(settings.student or teacher)


def data_url(job: Job) -> str:
    """The table that the student is taught from."""
    if job.recipe.distill.table is not None:
        return job.source(job.recipe.distill.table)
    return job.place("latents" if job.recipe.distill.targets == "online" else "targets")


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The figures that matter, in words."""
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    return [
        f"{metrics['distillation']['steps']} steps, {branch}: held-out distillation loss "
        f"{before[branch]['loss']:.5f} at first, {after[branch]['loss']:.5f} at last"
        for branch in after
    ]


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    settings, place = job.recipe.distill, job.place(job.recipe.distill.name)
    teacher, student = sources(job)
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    steps, loop = settings.steps, settings.loop
    return [
        f"would distil {steps.k * steps.student_steps} steps of {teacher} into {steps.student_steps} of "
        f"{student} on {data_url(job)} for {loop.num_steps} steps of {loop.global_batch} rows, into {place} "
        f"({held})"
    ]


if __name__ == "__main__":
    leave(main())
