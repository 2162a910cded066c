"""What `jobs.ablate` compares: students, and panels of lines that they are drawn in. SnapFusion Fig. 6, 7.

The paper's students take 8 steps and learn from 16. On the miniature 8 steps are hardly worse than 50
(docs/miniature/sweep.json), so most panels halve the steps once more: 4 from 8.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from pipelines.stages.settings import Sampler
from snapfusion.settings import Settings
from snapfusion.training.settings import StepDistillationSettings

_NAME = r"^[A-Za-z0-9_.+-]+$"
Guidance = Annotated[float, Field(ge=1.0)]


class StudentVariant(Settings):
    """A student, trained once for each seed; what is not said here is as `Recipe.distill` says.

    Attributes:
        name: of its folders.
        steps: what it learns; null for the control, which is trained as long on L_ori alone (Eq. 6).
        after: the variant that is its teacher and its first weights; null takes the model for both.
    """

    name: str = Field(pattern=_NAME)
    steps: StepDistillationSettings | None = None
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


class AblationSettings(Settings):
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
    variants: tuple[StudentVariant, ...] = ()
    panels: tuple[Panel, ...] = ()
    only: tuple[str, ...] = ()
    most_seeds: PositiveInt | None = None
    pictures_at: Guidance = 6.0

    @model_validator(mode="after")
    def _names_are_known(self) -> AblationSettings:
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

    def lineage(self, name: str) -> list[StudentVariant]:
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
