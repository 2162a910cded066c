"""Students and panels of the ablations at the size of the miniature. SnapFusion Fig. 6, 7.

Students of different methods are trained for equally many passes of the networks; those of one method that
differ in its settings (Fig. 7) for equally many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

from jobs.recipes.ablation import AblationSettings, Line, Panel, StudentVariant
from snapfusion.training.passes import training_passes
from snapfusion.training.settings import CfgRange, StepDistillationSettings

FEW_STEPS: Final = 4
"""With 8 steps the miniature is hardly worse than with 16; with 4 it is, at high guidance (MODEL_CARD.md)."""

LEARNING_RATES: Final = (3e-5, 1e-4, 3e-4)
"""Tried for each method in the panel `learning-rates`, by FID on the tuning captions."""
CHOSEN_RATES: Final[Mapping[str, float]] = {
    "control": 1e-4,
    "vanilla": 1e-4,
    "mixed": 1e-4,
    "cfg": 1e-4,
    "w-conditioned": 1e-4,
}
"""The rate of each method, for which the panel `learning-rates` is to be made: it has not been yet."""

_PASSES: Final = 3_900.0
"""Passes for each row of the batch in the training of a student: those of 300 CFG-aware steps."""
_WITHOUT_ORIGINAL: Final[dict[str, Any]] = {"gamma": 0.0, "gamma_rule": "constant"}
"""Without L_ori, as progressive (Salimans & Ho 2022) and w-conditioned students (Meng et al. 2023) learn."""
_HALVINGS: Final = (16, 8, FEW_STEPS)
"""Steps of students that halve those of the one before."""
_MANY_SEEDS: Final = 6
"""Training seeds of what README claims."""

_RESCALES: Final = (0.3, 0.7)
"""Shares of guidance rescale; 0.7 is the paper's (Lin et al. 2023)."""
_INTERVALS: Final = ((0, 800), (300, 999))
"""Timesteps with guidance (Kynkäänniemi et al. 2024): all but the noisiest, all but the cleanest."""


def miniature_ablation(v_model: str, *, cfg_range: CfgRange, narrow_range: CfgRange) -> AblationSettings:
    """Fig. 6(a-d) and 7(a-c).

    Args:
        v_model: source of the v-prediction model that students start from.
        cfg_range: the useful range of w.
        narrow_range: a part of it, with which Fig. 6(d) compares.
    """
    variants = (
        *_methods(cfg_range),
        *_in_eight_steps(cfg_range),
        *_by_branch(cfg_range, narrow=narrow_range),
        *_by_original_loss(cfg_range),
        *_by_teacher_steps(cfg_range),
        *_halving("progressive", method="vanilla", cfg_range=cfg_range),
        *_halving("w-cond", method="w-conditioned", cfg_range=cfg_range),
    )
    panels = _panels(wide=_name_of(cfg_range), narrow=_name_of(narrow_range))
    return AblationSettings(model=v_model, variants=variants, panels=panels)


def _steps(method: str, cfg_range: CfgRange, **changes: Any) -> StepDistillationSettings:  # noqa: ANN401 - settings
    """The distillation of a method, but for `changes`."""
    of_method: dict[str, dict[str, Any]] = {
        "vanilla": {"cfg_probability": 0.0},
        "mixed": {"cfg_probability": 0.3},
        "cfg": {"cfg_probability": 1.0},
        "w-conditioned": {"cfg_probability": 1.0, "w_conditioned": True} | _WITHOUT_ORIGINAL,
    }
    shared: dict[str, Any] = {"student_steps": FEW_STEPS, "cfg_range": cfg_range}
    return StepDistillationSettings(**shared | of_method[method] | changes)


def _student(
    name: str, steps: StepDistillationSettings | None, *, method: str, num_steps: int | None = None
) -> StudentVariant:
    """A student at its method's rate, trained for `_PASSES` unless for a number of steps."""
    return StudentVariant(
        name=name,
        steps=steps,
        num_steps=num_steps or round(_PASSES / training_passes(steps)),
        learning_rate=CHOSEN_RATES[method],
    )


def _methods(cfg_range: CfgRange) -> Iterator[StudentVariant]:
    """A student of each method at each rate; the one at the chosen rate has the method's name."""
    for method, chosen in CHOSEN_RATES.items():
        steps = None if method == "control" else _steps(method, cfg_range)
        student = _student(method, steps, method=method)
        yield student
        for rate in LEARNING_RATES:
            if rate != chosen:
                changes = {"name": _at_rate(method, rate), "learning_rate": rate}
                yield student.model_copy(update=changes)


def _at_rate(method: str, rate: float) -> str:
    return method if rate == CHOSEN_RATES[method] else f"{method}-lr{rate:g}"


def _in_eight_steps(cfg_range: CfgRange) -> Iterator[StudentVariant]:
    for method in ("vanilla", "mixed", "cfg", "w-conditioned"):
        yield _student(f"{method}-8", _steps(method, cfg_range, student_steps=8), method=method)


def _by_branch(cfg_range: CfgRange, *, narrow: CfgRange) -> Iterator[StudentVariant]:
    """Fig. 6(d): by the probability of guided steps, and the range of their w."""
    for p, each in ((0.1, narrow), (0.1, cfg_range), (0.3, narrow), (0.5, cfg_range)):
        yield _student(f"p{p}-{_name_of(each)}", _steps("mixed", each, cfg_probability=p), method="mixed")


def _by_original_loss(cfg_range: CfgRange) -> Iterator[StudentVariant]:
    """Fig. 7(a), 7(b): by the weight of L_ori."""
    weights: dict[str, dict[str, Any]] = {
        "gamma0.01": {"gamma": 0.01},
        "gamma1": {"gamma": 1.0},
        "constant0": _WITHOUT_ORIGINAL,
        "constant1": {"gamma": 1.0, "gamma_rule": "constant"},
    }
    mixed = _student("mixed", _steps("mixed", cfg_range), method="mixed")
    for name, changes in weights.items():
        steps = _steps("mixed", cfg_range, **changes)
        yield _student(name, steps, method="mixed", num_steps=mixed.num_steps)


def _by_teacher_steps(cfg_range: CfgRange) -> Iterator[StudentVariant]:
    """Fig. 7(c): by k."""
    vanilla = _student("vanilla", _steps("vanilla", cfg_range), method="vanilla")
    for k in (4, 8, 16):
        name, steps = f"vanilla-from-{k * FEW_STEPS}", _steps("vanilla", cfg_range, k=k)
        yield _student(name, steps, method="vanilla", num_steps=vanilla.num_steps)


def _halving(name: str, *, method: str, cfg_range: CfgRange) -> Iterator[StudentVariant]:
    """Students that halve the steps of the one before, 16, 8 and 4, in `_PASSES` together."""
    after = None
    for student_steps in _HALVINGS:
        steps = _steps(method, cfg_range, student_steps=student_steps, **_WITHOUT_ORIGINAL)
        passes = training_passes(steps, w_conditioned_teacher=steps.w_conditioned and after is not None)
        num_steps = round(_PASSES / len(_HALVINGS) / passes)
        student = _student(f"{name}-{student_steps}", steps, method=method, num_steps=num_steps)
        yield student.model_copy(update={"after": after})
        after = student.name


def _panels(*, wide: str, narrow: str) -> tuple[Panel, ...]:
    return (
        _learning_rates(),
        _panel(
            "6c",
            "Vanilla, CFG-aware and mixed: 4 steps from 8",
            Line(name="teacher-8", steps=8),
            *("vanilla", "mixed", "cfg", "control"),
            control="control",
            seeds=_MANY_SEEDS,
        ),
        _panel(
            "6b",
            "w-conditioned and guided",
            *(Line(name=f"w-cond-{steps}", variant=f"w-cond-{steps}", steps=steps) for steps in (16, 8)),
            *("w-cond-4", "mixed", "cfg"),
        ),
        _panel(
            "8-steps",
            "Vanilla, CFG-aware and mixed: 8 steps from 16",
            Line(name="teacher-16", steps=16),
            *("vanilla-8", "mixed-8", "cfg-8"),
            Line(name="control-8", variant="control", steps=8),
            steps=8,
            control="control-8",
        ),
        _panel(
            "7b",
            "Weight of the original loss",
            *("gamma0.01", _line("gamma0.2", of="mixed"), "gamma1", "constant0", "constant1"),
        ),
        _panel(
            "7a",
            "With and without the original loss",
            _line("with-original", of="mixed"),
            _line("without-original", of="constant0"),
        ),
        _panel(
            "6d",
            "CFG probability and range",
            _line("p0", of="vanilla"),
            *(f"p0.1-{narrow}", f"p0.1-{wide}", f"p0.3-{narrow}"),
            _line(f"p0.3-{wide}", of="mixed"),
            f"p0.5-{wide}",
            _line(f"p1-{wide}", of="cfg"),
        ),
        _panel(
            "7c",
            "Steps of the teacher, vanilla loss",
            _line("from-8", of="vanilla"),
            *(_line(f"from-{steps}", of=f"vanilla-from-{steps}") for steps in (16, 32, 64)),
        ),
        _panel(
            "6a",
            "Direct and progressive, vanilla loss",
            _line("direct", of="vanilla"),
            _line("progressive", of="progressive-4"),
        ),
    )


def _learning_rates() -> Panel:
    """Each method at each rate, of which the tuning captions choose one."""
    few = Line(name=f"undistilled-{FEW_STEPS}", steps=FEW_STEPS)
    students = (
        Line(name=f"{method}-lr{rate:g}", variant=_at_rate(method, rate), steps=FEW_STEPS, family=method)
        for method in CHOSEN_RATES
        for rate in LEARNING_RATES
    )
    return Panel(
        name="learning-rates",
        title="Learning rates of each method",
        lines=(Line(name="teacher-50", steps=50), few, *students),
        baseline=few.name,
    )


def _panel(
    name: str,
    title: str,
    *lines: Line | str,
    steps: int = FEW_STEPS,
    control: str | None = None,
    seeds: int = 3,
) -> Panel:
    """A panel of students beside the w-conditioned one, the undistilled model, and the free baselines.

    A name among the `lines` is that of a student, and of its line of few steps.
    """
    few = Line(name=f"undistilled-{steps}", steps=steps)
    rival = "w-conditioned" if steps == FEW_STEPS else f"w-conditioned-{steps}"
    students = (
        Line(name=one, variant=one, steps=steps) if isinstance(one, str) else one for one in (*lines, rival)
    )
    return Panel(
        name=name,
        title=title,
        lines=(Line(name="teacher-50", steps=50), few, *students, *_free_baselines(steps)),
        baseline=few.name,
        control=control,
        seeds=seeds,
    )


def _line(name: str, *, of: str) -> Line:
    """A line of the student `of` in few steps."""
    return Line(name=name, variant=of, steps=FEW_STEPS)


def _name_of(cfg_range: CfgRange) -> str:
    return f"w{cfg_range.low:g}to{cfg_range.high:g}"


def _free_baselines(steps: int) -> Iterator[Line]:
    """The undistilled model by every solver: plain, with guidance rescale, and guided in an interval."""
    for solver in ("ddim", "dpm", "dpm++", "dpm++singlestep", "unipc"):
        line = partial(Line, steps=steps, solver=solver)
        if solver != "ddim":  # which every panel has
            yield line(name=f"{solver}-{steps}")
        for share in _RESCALES:
            name = f"{solver}-{steps}-rescale"
            yield line(name=f"{name}{share:g}", guidance_rescale=share, family=name)
        for low, high in _INTERVALS:
            name = f"{solver}-{steps}-interval"
            yield line(name=f"{name}{low}to{high}", guidance_interval=(low, high), family=name)
