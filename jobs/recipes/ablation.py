"""Settings of the ablations: students, and panels of lines that compare them. SnapFusion Fig. 6, 7.

The paper's students take 8 steps and learn from 16. On the miniature 8 steps are hardly worse than 16
(docs/miniature/sweep.json), so most panels halve the steps once more: 4 from 8.
"""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.evaluation.settings import Guidance
from pipelines.stages.settings import Sampler
from snapfusion.settings import FOLDER_NAME, Settings
from snapfusion.training.settings import StepDistillationSettings


class StudentVariant(Settings):
    """A student, trained once for each seed; everything else is as in `Recipe.distill`.

    Attributes:
        name: of its folders.
        steps: its distillation; null for the control, which is trained as long on L_ori alone (Eq. 6).
        after: the variant that is its teacher and gives its initial weights; null takes the model for both.
        num_steps: optimizer steps; null takes the recipe's.
        learning_rate: likewise.
    """

    name: str = Field(pattern=FOLDER_NAME)
    steps: StepDistillationSettings | None = None
    after: str | None = None
    num_steps: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None


class Line(Sampler):
    """One line of a panel: a model and its sampler.

    Attributes:
        name: in the legend, unless it is of a family.
        variant: the student, one line for each seed; null for the undistilled model.
        family: name in the legend of lines that differ in one number, which is chosen on the tuning captions.
    """

    name: str = Field(pattern=FOLDER_NAME)
    variant: str | None = None
    family: str | None = Field(None, pattern=FOLDER_NAME)

    @property
    def label(self) -> str:
        """Name in the legend."""
        return self.family or self.name

    @property
    def sampler(self) -> Sampler:
        """The sampler alone."""
        return Sampler(**{name: getattr(self, name) for name in Sampler.model_fields})

    @property
    def is_free(self) -> bool:
        """Whether it is the undistilled model, for which no training is needed, but not by plain DDIM."""
        return self.variant is None and self.sampler != Sampler(solver="ddim", steps=self.steps)


class Panel(Settings):
    """Lines on common axes.

    Attributes:
        name: of its files, by the paper's figure.
        title: of the chart.
        lines: in order of the legend.
        baseline: the undistilled line of few steps, with which the others are compared.
        many: the undistilled line of many steps, at the far end of the gap and the reference at equal FID.
        control: the line of a control, with which students are compared too; null for none.
        seeds: of training; lines without a student have none.
        gap_at: guidance scales at which the gap is measured.
    """

    name: str = Field(pattern=FOLDER_NAME)
    title: str
    lines: tuple[Line, ...]
    baseline: str
    many: str = "teacher-50"
    control: str | None = None
    seeds: PositiveInt = 1
    gap_at: tuple[Guidance, ...] = (2.0, 4.0, 6.0)


class AblationSettings(Settings):
    """Settings of all students and panels.

    Attributes:
        model: source of the v-prediction model that students start from.
        variants: students, each after the one it starts from.
        panels: in order of the page.
        only: names of the panels to make now; empty for all.
        most_seeds: upper bound on the seeds of every panel, for a first look.
        images_at: guidance of the images that are shown.
    """

    model: str = "mini-v"
    variants: tuple[StudentVariant, ...] = ()
    panels: tuple[Panel, ...] = ()
    only: tuple[str, ...] = ()
    most_seeds: PositiveInt | None = None
    images_at: Guidance = 6.0

    @model_validator(mode="after")
    def _names_are_known(self) -> AblationSettings:
        known: set[str] = set()
        for variant in self.variants:
            if variant.after is not None and variant.after not in known:
                raise ValueError(f"variant {variant.name}: after={variant.after!r} is no earlier variant")
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
                    raise ValueError(f"panel {panel.name}: {name!r} is not a line of the undistilled model")
        if unknown := sorted(set(self.only) - {panel.name for panel in self.panels}):
            names = ", ".join(panel.name for panel in self.panels)
            raise ValueError(f"only: there is no panel {unknown[0]!r}; accepted are {names}")
        return self

    @property
    def chosen(self) -> tuple[Panel, ...]:
        """Panels to make now."""
        return tuple(panel for panel in self.panels if not self.only or panel.name in self.only)

    def seeds_of(self, panel: Panel) -> range:
        """Training seeds of a panel."""
        return range(min(panel.seeds, self.most_seeds or panel.seeds))

    def lineage(self, name: str) -> list[StudentVariant]:
        """A variant and all that it starts from, the earliest first."""
        variant = next(variant for variant in self.variants if variant.name == name)
        return [*(self.lineage(variant.after) if variant.after is not None else []), variant]


def contender_name(line: Line, seed: int) -> str:
    """Name of a line of one seed; the undistilled model has one line for all seeds."""
    return of_seed(line, line.name, seed)


def of_seed(line: Line, name: str, seed: int) -> str:
    """A name with the seed, if the line has a student."""
    return name if line.variant is None else f"{name}-seed{seed}"


def table_name(line: Line, seed: int) -> str:
    """Table of the samples of a line of one seed, shared by lines that differ in name only."""
    student = "undistilled" if line.variant is None else f"{line.variant}-seed{seed}"
    parts = [student, str(line.steps), *([line.solver] if line.solver != "ddim" else [])]
    if line.guidance_rescale:
        parts.append(f"rescale{line.guidance_rescale:g}")
    if line.guidance_interval is not None:
        parts.append("guided{}to{}".format(*line.guidance_interval))
    return "-".join(parts)
