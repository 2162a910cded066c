"""What `jobs.ablate` compares: students, and panels of lines that they are drawn in. SnapFusion Fig. 6, 7.

The paper's students take 8 steps and learn from 16. On the miniature 8 steps are hardly worse than 50
(docs/miniature/sweep.json), so most panels halve the steps once more: 4 from 8.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from pipelines.stages.sample import Sampler
from snapfusion.settings import Settings
from snapfusion.training.draws import CfgRange
from snapfusion.training.steps import StepsSettings

_NAME = r"^[A-Za-z0-9_.+-]+$"
Guidance = Annotated[float, Field(ge=1.0)]


class Variant(Settings):
    """A student, trained once for each seed; what is not said here is as `Recipe.distill` says.

    Attributes:
        name: of its folders.
        steps: what it learns; null for the control, which is trained as long on L_ori alone (Eq. 6).
        after: the variant that is its teacher and its first weights; null takes the model for both.
    """

    name: str = Field(pattern=_NAME)
    steps: StepsSettings | None = None
    after: str | None = None


class Line(Settings):
    """One line of a panel.

    Attributes:
        name: in the legend.
        variant: the student that draws it, one line for each seed; null for the model as it is.
        steps: DDIM steps.
    """

    name: str = Field(pattern=_NAME)
    variant: str | None = None
    steps: PositiveInt

    @property
    def sampler(self) -> Sampler:
        """DDIM, at the line's steps."""
        return Sampler(solver="ddim", steps=self.steps)


class Panel(Settings):
    """Lines on common axes.

    Attributes:
        name: of its files, by the paper's figure.
        title: what it shows.
        lines: in order of the legend.
        baseline: the line of few steps without distillation, which the others are held against.
        many: the line of many steps, to which the gap is closed, and which CLIP is read against at equal FID.
        control: the line of a control, against which students are held too; null for none.
        seeds: of training; lines without a student have none.
        gap_at: guidance scales at which the gap is read.
    """

    name: str = Field(pattern=_NAME)
    title: str
    lines: tuple[Line, ...]
    baseline: str
    many: str = "teacher-50"
    control: str | None = None
    seeds: PositiveInt = 1
    gap_at: tuple[Guidance, ...] = (2.0, 4.0, 6.0)


class Ablation(Settings):
    """All students and panels.

    Attributes:
        model: the source that students are made from, which predicts v.
        variants: students; each comes after the one it learns from.
        panels: what is drawn, in this order.
        only: names of the panels to draw now; empty for all.
        most_seeds: fewer seeds than panels ask for, for a first look.
        pictures_at: guidance of the pictures that are shown.
    """

    model: str = "mini-v"
    variants: tuple[Variant, ...] = ()
    panels: tuple[Panel, ...] = ()
    only: tuple[str, ...] = ()
    most_seeds: PositiveInt | None = None
    pictures_at: Guidance = 6.0

    @model_validator(mode="after")
    def _names_are_known(self) -> Ablation:
        known: set[str] = set()
        for variant in self.variants:
            if variant.after is not None and variant.after not in known:
                raise ValueError(
                    f"variant {variant.name} comes after {variant.after!r}, which is not before it"
                )
            known.add(variant.name)
        for panel in self.panels:
            for line in panel.lines:
                if line.variant is not None and line.variant not in known:
                    raise ValueError(f"panel {panel.name}: there is no variant {line.variant!r}")
            lines = {line.name: line for line in panel.lines}
            if panel.control is not None and panel.control not in lines:
                raise ValueError(f"panel {panel.name}: there is no line {panel.control!r}")
            for name in (panel.baseline, panel.many):
                if name not in lines or lines[name].variant is not None:
                    raise ValueError(f"panel {panel.name}: {name!r} is not a line of the model as it is")
        if unknown := sorted(set(self.only) - {panel.name for panel in self.panels}):
            names = ", ".join(panel.name for panel in self.panels)
            raise ValueError(f"there is no panel {unknown[0]!r}; there are {names}")
        return self

    @property
    def chosen(self) -> tuple[Panel, ...]:
        """The panels to draw now."""
        return tuple(panel for panel in self.panels if not self.only or panel.name in self.only)

    def seeds_of(self, panel: Panel) -> range:
        """The training seeds of a panel."""
        return range(min(panel.seeds, self.most_seeds or panel.seeds))

    def lineage(self, name: str) -> list[Variant]:
        """A variant and those that it comes after, the first of them first."""
        variant = next(variant for variant in self.variants if variant.name == name)
        return [*(self.lineage(variant.after) if variant.after is not None else []), variant]


def contender_name(line: Line, seed: int) -> str:
    """What a line of one seed is called; without a student there is one line for all seeds."""
    return line.name if line.variant is None else f"{line.name}-seed{seed}"


def table_name(line: Line, seed: int) -> str:
    """The table that a line of one seed is drawn into; panels whose lines differ by name only share it."""
    student = "undistilled" if line.variant is None else f"{line.variant}-seed{seed}"
    return f"{student}-{line.steps}"


_FEW, _MANY = 4, 50
_WIDE = CfgRange(low=1.0, high=6.0)
_NARROW = CfgRange(low=1.0, high=4.0)


def miniature_ablation() -> Ablation:
    """Fig. 6(a-d) and 7(a-c) for the miniature, whose useful range of w is [1, 6] in place of [2, 14]."""
    return Ablation(
        variants=(
            Variant(name="control"),
            _variant("vanilla", p=0.0),
            _variant("mixed"),
            _variant("cfg", p=1.0),
            _variant("vanilla-8", p=0.0, student_steps=8),
            _variant("mixed-8", student_steps=8),
            _variant("cfg-8", p=1.0, student_steps=8),
            _variant("p0.1-w1to4", p=0.1, cfg_range=_NARROW),
            _variant("p0.1-w1to6", p=0.1),
            _variant("p0.3-w1to4", cfg_range=_NARROW),
            _variant("p0.5-w1to6", p=0.5),
            _variant("gamma0.01", gamma=0.01),
            _variant("gamma1", gamma=1.0),
            _variant("constant0", gamma=0.0, constant=True),
            _variant("constant1", gamma=1.0, constant=True),
            _variant("vanilla-from-16", p=0.0, k=4),
            _variant("vanilla-from-32", p=0.0, k=8),
            _variant("vanilla-from-64", p=0.0, k=16),
            _variant("progressive-16", p=0.0, student_steps=16),
            _variant("progressive-8", p=0.0, student_steps=8, after="progressive-16"),
            _variant("progressive-4", p=0.0, after="progressive-8"),
            _variant("told-16", p=1.0, student_steps=16, told=True),
            _variant("told-8", p=1.0, student_steps=8, told=True, after="told-16"),
            _variant("told-4", p=1.0, told=True, after="told-8"),
        ),
        panels=(
            Panel(
                name="6c",
                title="Vanilla, CFG-aware and mixed: 4 steps from 8",
                lines=_lines(
                    Line(name="teacher-8", steps=8),
                    *(_line(name) for name in ("vanilla", "mixed", "cfg", "control")),
                ),
                baseline="undistilled-4",
                control="control",
                seeds=3,
            ),
            Panel(
                name="8-steps",
                title="Vanilla, CFG-aware and mixed: 8 steps from 16",
                lines=(
                    Line(name="teacher-50", steps=_MANY),
                    Line(name="undistilled-8", steps=8),
                    Line(name="teacher-16", steps=16),
                    *(_line(name, steps=8) for name in ("vanilla-8", "mixed-8", "cfg-8")),
                    Line(name="control-8", variant="control", steps=8),
                ),
                baseline="undistilled-8",
                control="control-8",
            ),
            Panel(
                name="7b",
                title="Weight of the original loss",
                lines=_lines(
                    _line("gamma0.01"),
                    Line(name="gamma0.2", variant="mixed", steps=_FEW),
                    _line("gamma1"),
                    _line("constant0"),
                    _line("constant1"),
                ),
                baseline="undistilled-4",
                seeds=3,
            ),
            Panel(
                name="7a",
                title="With and without the original loss",
                lines=_lines(
                    Line(name="with-original", variant="mixed", steps=_FEW),
                    Line(name="without-original", variant="constant0", steps=_FEW),
                ),
                baseline="undistilled-4",
            ),
            Panel(
                name="6d",
                title="CFG probability and range",
                lines=_lines(
                    Line(name="p0", variant="vanilla", steps=_FEW),
                    _line("p0.1-w1to4"),
                    _line("p0.1-w1to6"),
                    _line("p0.3-w1to4"),
                    Line(name="p0.3-w1to6", variant="mixed", steps=_FEW),
                    _line("p0.5-w1to6"),
                    Line(name="p1-w1to6", variant="cfg", steps=_FEW),
                ),
                baseline="undistilled-4",
                seeds=3,
            ),
            Panel(
                name="7c",
                title="Steps of the teacher, vanilla loss",
                lines=_lines(
                    Line(name="from-8", variant="vanilla", steps=_FEW),
                    *(
                        Line(name=f"from-{steps}", variant=f"vanilla-from-{steps}", steps=_FEW)
                        for steps in (16, 32, 64)
                    ),
                ),
                baseline="undistilled-4",
            ),
            Panel(
                name="6a",
                title="Direct and progressive, vanilla loss",
                lines=_lines(
                    Line(name="direct", variant="vanilla", steps=_FEW),
                    Line(name="progressive", variant="progressive-4", steps=_FEW),
                ),
                baseline="undistilled-4",
            ),
            Panel(
                name="6b",
                title="Told w, and guided",
                lines=_lines(
                    Line(name="told-16", variant="told-16", steps=16),
                    Line(name="told-8", variant="told-8", steps=8),
                    Line(name="told-4", variant="told-4", steps=_FEW),
                    Line(name="mixed", variant="mixed", steps=_FEW),
                ),
                baseline="undistilled-4",
            ),
        ),
    )


def _variant(
    name: str,
    *,
    p: float = 0.3,
    cfg_range: CfgRange = _WIDE,
    gamma: float = 0.2,
    constant: bool = False,
    student_steps: int = _FEW,
    k: int = 2,
    told: bool = False,
    after: str | None = None,
) -> Variant:
    return Variant(
        name=name,
        after=after,
        steps=StepsSettings(
            student_steps=student_steps,
            k=k,
            cfg_probability=p,
            cfg_range=cfg_range,
            gamma=gamma,
            gamma_rule="constant" if constant else "dynamic",
            w_conditioned=told,
        ),
    )


def _line(name: str, *, steps: int = _FEW) -> Line:
    return Line(name=name, variant=name, steps=steps)


def _lines(*students: Line) -> tuple[Line, ...]:
    """The model's many and few steps, and then these."""
    return (Line(name="teacher-50", steps=_MANY), Line(name="undistilled-4", steps=_FEW), *students)
