"""Settings of evaluation, latency and efficiency measurements."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.settings import Sampler
from snapfusion.evolution.settings import Precision, Runtime
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import Settings

_NAME = r"^[A-Za-z0-9_.+-]+$"


class Contender(Settings):
    """A model and a sampler.

    Attributes:
        name: of its line, and of its table unless `table` says another.
        model: a source that `snapfusion.models.load` accepts, or (for the job) "run:" and a place in the run,
            such as a student's model, raw or best; None is the recipe's.
        sampler: solver and steps.
        decoder: the folder of a half-width decoder, or (for the job) likewise; None takes the model's own.
        table: the table of its pictures, where evaluations share one.
    """

    name: str = Field(pattern=_NAME)
    model: str | None = None
    sampler: Sampler = Sampler()
    decoder: str | None = None
    table: str | None = Field(None, pattern=_NAME)


class PromptSettings(Settings):
    """Which captions are drawn.

    Attributes:
        name: a short name; units are named after it.
        url: a caption list; None takes the captions of the miniature's held-out scenes.
        reading: which columns of the list.
        limit: how many, from the first on; by default each of the miniature's captions once.
    """

    name: str = Field("scenes", pattern=_NAME)
    url: str | None = None
    reading: CaptionSettings = CaptionSettings()
    limit: int = Field(NUM_CAPTIONS, ge=4)


class FidGap(Settings):
    """How much of the way from few steps to many a student goes: names of contenders, and a guidance."""

    student: str
    few: str
    many: str
    w: float = Field(ge=1.0)


class EvaluationSettings(Settings):
    """Who is compared, and how.

    Attributes:
        contenders: models and samplers, all of the same captions from the same noise.
        baseline: the contender that the others are held against.
        also_against: further contenders that all others are held against.
        guidance: scales w of SnapFusion Eq. 3, rising.
        prompts: captions.
        references: real pictures.
        samples: how pictures are drawn and judged.
        groups: neighbourhoods of captions that intervals leave out, one at a time.
        gaps: shares of a FID gap to be read.
    """

    contenders: tuple[Contender, ...] = tuple(
        Contender(name=f"{solver}-{steps}", sampler=Sampler(solver=solver, steps=steps))
        for solver in ("ddim", "dpm", "dpm++")
        for steps in (50, 16, 8, 4)
    )
    baseline: str = "ddim-50"
    also_against: tuple[str, ...] = ()
    guidance: tuple[float, ...] = tuple(1.0 + 0.5 * step for step in range(11))
    prompts: PromptSettings = PromptSettings()
    references: ReferencesSettings = ReferencesSettings()
    samples: SamplesSettings = SamplesSettings()
    groups: int = Field(20, ge=2)
    gaps: tuple[FidGap, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> EvaluationSettings:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names):
            raise ValueError(f"names of contenders repeat: {', '.join(names)}")
        asked = {
            self.baseline,
            *self.also_against,
            *(name for gap in self.gaps for name in (gap.student, gap.few, gap.many)),
        }
        if unknown := sorted(asked - set(names)):
            raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(names)}")
        if list(self.guidance) != sorted(set(self.guidance)) or not self.guidance:
            raise ValueError(f"guidance must rise, with one scale at least: {list(self.guidance)}")
        return self


class TimingSettings(Settings):
    """How times are taken.

    Attributes:
        runtime: what computes.
        precision: of the networks.
        device: where.
        threads: of the CPU.
        batch: latents at once; 2 is one that is guided.
        tokens: of an encoded caption; null takes as many as the model's tokenizer gives.
        turns: of each thing that is timed.
    """

    runtime: Runtime = "torch"
    precision: Precision = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt = 1
    batch: PositiveInt = 2
    tokens: PositiveInt | None = None
    turns: int = Field(20, ge=2)

    @property
    def name(self) -> str:
        """Of the file of what was measured."""
        return f"{self.runtime}-{self.precision}-{self.device}"

    def tokens_of(self, tokenizer: Any) -> int:  # noqa: ANN401 - a tokenizer of transformers
        """Tokens of an encoded caption."""
        return self.tokens or int(tokenizer.model_max_length)


class EfficiencySettings(TimingSettings):
    """How the networks are compared.

    Attributes:
        batch: latents at once; guidance asks for each twice, so 2 is one picture.
        loop: whether 50 steps of one and 8 of the other are executed; if not, steps times the median is told.
    """

    batch: int = Field(2, ge=2, multiple_of=2)
    loop: bool = True


class LatencySettings(TimingSettings):
    """How the table is measured."""
