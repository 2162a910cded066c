"""Distillation schedules: students distilled one after the other. SnapFusion Sec. 4.1 and its ablations."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from jobs.training.sources import OWN_IMAGES_TABLE
from snapfusion.settings import FOLDER_NAME, Settings
from snapfusion.training.settings import Dmd2Settings, LoopSettings


class DistillationStage(Settings):
    """Settings of one stage of step distillation; everything else is as in `Recipe.distill`.

    Attributes:
        name: of the student's folder in the run.
        teacher: its source, "run:" and a path in the run, or "recipe:model".
        student: the source of its initial weights, likewise.
        student_steps: N_S, the steps that the student takes.
        k: steps of the teacher for one of the student.
        cfg_probability: p of Eq. 11; null takes that of `distill`.
        w_conditioned: whether the student is w-conditioned; null takes that of `distill`.
        table: URL of the training LATENTS, or "run:" and a path in the run; null takes that of `distill`.
        dmd2: distribution matching in place of step distillation, if `distill` does not state its own.
        loop: optimizer and schedule; null takes that of `distill`.
    """

    name: str = Field(pattern=FOLDER_NAME)
    teacher: str
    student: str
    student_steps: int = Field(ge=1)
    k: int = Field(2, ge=1)
    cfg_probability: float | None = Field(None, ge=0.0, le=1.0)
    w_conditioned: bool | None = None
    table: str | None = None
    dmd2: Dmd2Settings | None = None
    loop: LoopSettings | None = None


Schedule = tuple[DistillationStage, ...]


def paper_schedules(model: str, *, small: str | None = None) -> dict[str, Schedule]:
    """Schedules that the paper compares, by name.

    staged          Sec. 4.1: 32 to 16 steps for teacher and student, then 16 to 8; the last teacher has been
                    distilled with CFG, App. D's best
    staged-own      Sec. 5: `staged`, and then the same steps on images of one's own
    staged-self     App. D: the last teacher is the student's own model of 16 steps
    staged-plain    App. D: the last teacher is the model without distillation, run at 16 steps
    staged-vanilla  Fig. 4: as `staged-self`, the last student by the vanilla loss alone
    direct          Fig. 6(a): 16 to 8 at once
    progressive     Fig. 6(a) and Sec. 5.1: 64 to 32, 16 and 8, by the vanilla loss
    w-conditioned   Fig. 6(b): the same way, by w-conditioned students (Meng et al. 2023)
    cfg-aware-1     beyond the paper: 16, 8, 4, 2 and 1 steps, each student the teacher of the next, CFG-aware
    w-conditioned-1 beyond the paper: `w-conditioned` and on to 4, 2 and 1
    phased          8, 4, 2 and 1, each begun from the last student and taught by the model; with
                    `distill.consistency` they are phases (Wang et al. 2024)

    Students of one name are the same in all schedules, so schedules can share a run.

    Args:
        model: source of the v-prediction model.
        small: source of a smaller model to distil with the first as its teacher; None distils the first.
            Its model of 16 steps is then its own teacher, so `staged-self` is `staged`.
    """
    teacher = _stage("teacher-16", 16, teacher=model)
    schedules: dict[str, Schedule] = {"direct": (_stage("direct-8", 8, teacher=model),)}
    if small is None:
        made = _model_of(teacher)
        schedules |= {
            "staged": (teacher, _stage("staged-8", 8, teacher=made)),
            "staged-plain": (teacher, _stage("plain-8", 8, teacher=model, student=made)),
        }
    else:
        own = _stage("small-16", 16, teacher=model, student=small)
        staged = _stage("staged-8", 8, teacher=_model_of(teacher), student=_model_of(own))
        last = _stage(
            "own-8", 8, teacher=_model_of(teacher), student=_model_of(staged), table=OWN_IMAGES_TABLE
        )
        schedules |= {
            "staged": (teacher, own, staged),
            "staged-own": (teacher, own, staged, last),
            "staged-self": (own, _stage("self-8", 8, teacher=_model_of(own))),
            "staged-plain": (own, _stage("plain-8", 8, teacher=model, student=_model_of(own))),
            "staged-vanilla": (own, _stage("vanilla-8", 8, teacher=_model_of(own), cfg_probability=0.0)),
        }
    halved, fewer = (32, 16, 8), (4, 2, 1)
    # These keep the L_ori of `distill`; the published ones have none: `--set distill.steps.gamma=0`.
    return schedules | {
        "progressive": halving("progressive", *halved, model=model, cfg_probability=0.0),
        "w-conditioned": halving(
            "w-conditioned", *halved, model=model, cfg_probability=1.0, w_conditioned=True
        ),
        "cfg-aware-1": halving("cfg-aware", 16, 8, *fewer, model=model, cfg_probability=1.0),
        "w-conditioned-1": halving(
            "w-conditioned", *halved, *fewer, model=model, cfg_probability=1.0, w_conditioned=True
        ),
        "phased": _phased(8, *fewer, model=model),
    }


def distribution_matching(
    *, teacher: str, student: str, loop: LoopSettings, dmd2: Dmd2Settings | None = None
) -> dict[str, Schedule]:
    """The schedule "dmd2": a student of 4 steps by distribution matching (Yin et al. 2024).

    Args:
        teacher: source of the model, which predicts eps or v.
        student: source of the same model, which predicts v.
        loop: of the training.
        dmd2: its objective; None takes the defaults, which are those of its SD-v1.5 script.
    """
    objective = dmd2 or Dmd2Settings()
    stage = _stage("dmd2-4", 4, teacher=teacher, student=student, dmd2=objective, loop=loop)
    return {"dmd2": (stage,)}


def starts_from(schedule: Sequence[DistillationStage], source: str) -> bool:
    """Whether a stage starts from the model of `source`."""
    return any(source in (stage.teacher, stage.student) for stage in schedule)


def _stage(name: str, steps: int, *, teacher: str, student: str = "", **changes: Any) -> DistillationStage:  # noqa: ANN401
    """A stage of a schedule; a student without initial weights of its own takes its teacher's."""
    return DistillationStage(
        name=name, teacher=teacher, student=student or teacher, student_steps=steps, **changes
    )


def halving(name: str, *steps: int, model: str, **changes: Any) -> Schedule:  # noqa: ANN401 - settings
    """From `model` to fewer and fewer steps, each student the teacher of the next."""
    stages = list[DistillationStage]()
    for count in steps:
        source = _model_of(stages[-1]) if stages else model
        stages.append(_stage(f"{name}-{count}", count, teacher=source, **changes))
    return tuple(stages)


def _phased(*steps: int, model: str) -> Schedule:
    """Fewer and fewer steps taught by `model`, each student begun from the last one."""
    stages = list[DistillationStage]()
    for count in steps:
        student = _model_of(stages[-1]) if stages else model
        stages.append(_stage(f"phased-{count}", count, teacher=model, student=student))
    return tuple(stages)


def _model_of(stage: DistillationStage) -> str:
    """Source of the student of a stage."""
    return f"run:{stage.name}/model"
