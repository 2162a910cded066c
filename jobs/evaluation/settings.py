"""Settings of evaluations, and of latency and efficiency measurements."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.settings import Sampler
from snapfusion.evolution.settings import Precision, Runtime
from snapfusion.metrics.settings import LpipsNetwork
from snapfusion.mini.split import Split, captions_in
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import FOLDER_NAME, Settings

ORIGIN, TABLE_3 = "origin", "table-3"
"""Names of the UNets that are measured: the model's own, and Table 3's."""


Guidance = Annotated[float, Field(ge=1.0)]


class Contender(Settings):
    """A model and a sampler to evaluate.

    Attributes:
        name: of its curve, and of its table unless `table` gives another.
        model: source of the model, or "run:" and a path in the run, such as a student's model, raw or best;
            null takes the recipe's.
        sampler: solver and steps.
        decoder: folder of a half-width decoder, or "run:" and a path in the run; null takes the model's own.
        guidance: its scales, increasing; [] for a model that is distilled to go without, as DMD2 is, which
            is sampled at w = 1; null takes the evaluation's.
        table: table of its images, for evaluations that share one.
        family: name of contenders that differ in one number, of which only the one with the lowest FID on the
            tuning captions is compared; null compares it in any case.
    """

    name: str = Field(pattern=FOLDER_NAME)
    model: str | None = None
    sampler: Sampler = Sampler()
    decoder: str | None = None
    guidance: tuple[Guidance, ...] | None = None
    table: str | None = Field(None, pattern=FOLDER_NAME)
    family: str | None = Field(None, pattern=FOLDER_NAME)


class PromptSettings(Settings):
    """Settings of the evaluation captions.

    Attributes:
        name: short name of the set; units are named after it.
        url: caption list; null takes the captions of the miniature's held-out scenes.
        reading: columns of the list.
        limit: number of captions from the start; by default each of the miniature's captions once.
        split: of the miniature's captions; null takes all. A list with captions of another split is refused.
        draws: images of each caption, each from its own noise.
    """

    name: str = Field("scenes", pattern=FOLDER_NAME)
    url: str | None = None
    reading: CaptionSettings = CaptionSettings()
    limit: int = Field(NUM_CAPTIONS, ge=4)
    split: Split | None = None
    draws: int = Field(1, ge=1, le=1_000)

    @property
    def num_images(self) -> int:
        """Images at one guidance, at most."""
        if self.url is None and self.split is not None:
            return self.draws * min(self.limit, len(captions_in(self.split)))
        return self.draws * self.limit


class TuningSettings(Settings):
    """Settings of the captions on which each contender's guidance and each family's contender are chosen.

    Attributes:
        prompts: captions, none of which is compared on.
        references: real images of these captions.
    """

    prompts: PromptSettings
    references: ReferencesSettings


class LpipsSettings(Settings):
    """Settings of LPIPS between the images of one caption, which needs several draws and kept images.

    Attributes:
        network: backbone.
        backbone: file of torchvision's weights of it, as `pinned_file` accepts it.
        backbone_sha256: of that file.
        heads: file of the weights of channels that the authors of LPIPS published, likewise.
        heads_sha256: of that file.
        captions: whose images are compared, from the first, at most.
    """

    network: LpipsNetwork = "alex"
    backbone: str
    backbone_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    heads: str
    heads_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    captions: int = Field(500, ge=2)


class FidGap(Settings):
    """Share of the FID gap from few steps to many that a student closes: three contenders and a guidance."""

    student: str
    few: str
    many: str
    w: float = Field(ge=1.0)


class Criterion(Settings):
    """A threshold stated before the evaluation: a contender's metric minus another's at one guidance.

    Attributes:
        contender: that is judged.
        against: that it is compared with.
        w: guidance.
        metric: "fid" or "clip".
        at_least: least difference, for CLIP.
        at_most: greatest difference, for FID.
    """

    contender: str
    against: str
    w: float = Field(ge=1.0)
    metric: Literal["fid", "clip"]
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _has_one_bound(self) -> Criterion:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("either at_least or at_most must be given")
        return self

    def is_met(self, difference: float) -> bool:
        """Whether a measured difference is within the bound."""
        if self.at_least is not None:
            return difference >= self.at_least
        return self.at_most is not None and difference <= self.at_most


class EvaluationSettings(Settings):
    """Settings of an evaluation.

    Attributes:
        contenders: models and samplers; all generate the same captions from the same noise. With none,
            there is nothing to evaluate.
        baseline: contender that the others are compared with.
        also_against: further contenders that all others are compared with.
        guidance: scales w of SnapFusion Eq. 3, increasing, of contenders that have none of their own.
        prompts: captions.
        references: real images.
        tuning: other captions, on which guidance and contenders are chosen; null chooses nothing.
        floor_redraws: sets of the miniature's real images, as many as are generated, whose mean FID is the
            least that a perfect model would have; 0 for none.
        kid_images: images of each side that KID uses, at most, as its time grows with their square; 0 for no
            KID.
        neighbor_images: images of each side for precision, recall, density and coverage, at most; 0 for
            none. They need six.
        lpips: of images of one caption; null for none.
        samples: sampling and scoring.
        groups: caption groups of the jackknife intervals, if there is one draw of each caption.
        gaps: FID gaps to report.
        criteria: thresholds that the results are judged by.
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
    tuning: TuningSettings | None = None
    floor_redraws: int = Field(20, ge=0)
    kid_images: int = Field(5_000, ge=0)
    neighbor_images: int = Field(5_000, ge=0)
    lpips: LpipsSettings | None = None
    samples: SamplesSettings = SamplesSettings()
    groups: int = Field(20, ge=2)
    gaps: tuple[FidGap, ...] = ()
    criteria: tuple[Criterion, ...] = ()

    def least_captions(self, prompts: PromptSettings) -> int:
        """Captions that intervals need."""
        return 2 * self.groups if prompts.draws == 1 else 2

    @property
    def num_images(self) -> int:
        """Images of a contender at one guidance, at most: those for tuning, too."""
        return self.prompts.num_images + (0 if self.tuning is None else self.tuning.prompts.num_images)

    def scales(self, contender: Contender) -> tuple[float, ...]:
        """The guidance scales of a contender."""
        if contender.guidance is None:
            return self.guidance
        return contender.guidance or (1.0,)

    @property
    def num_points(self) -> int:
        """Contenders times their guidance scales."""
        return sum(len(self.scales(contender)) for contender in self.contenders)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of UNets for one caption by all contenders at all their scales, at most."""
        return sum(
            contender.sampler.evaluations(w) for contender in self.contenders for w in self.scales(contender)
        )

    @property
    def num_references(self) -> int:
        """Real images, with those for tuning and for the floor."""
        tuning = 0
        if self.tuning is not None:
            paired = self.tuning.references.paired
            tuning = self.tuning.prompts.limit if paired else self.tuning.references.count
        floor = 0 if self.references.url else self.floor_redraws * self.prompts.num_images
        own = self.prompts.limit if self.references.paired else self.references.count
        return own + tuning + floor

    @model_validator(mode="after")
    def _is_consistent(self) -> EvaluationSettings:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names):
            raise ValueError(f"names of contenders repeat: {', '.join(names)}")
        used = {
            self.baseline,
            *self.also_against,
            *(name for gap in self.gaps for name in (gap.student, gap.few, gap.many)),
            *(name for one in self.criteria for name in (one.contender, one.against)),
        }
        if names and (unknown := sorted(used - set(names))):
            raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(names)}")
        self._check_guidance()
        return self

    def _check_guidance(self) -> None:
        if list(self.guidance) != sorted(set(self.guidance)) or not self.guidance:
            raise ValueError(f"guidance must be one or more increasing scales: {list(self.guidance)}")
        scales = {one.name: self.scales(one) for one in self.contenders}
        for name, own in scales.items():
            if list(own) != sorted(set(own)):
                raise ValueError(f"guidance of contender {name!r} must be increasing scales: {list(own)}")
        for one in self.criteria:
            for name in (one.contender, one.against):
                own = scales.get(name, self.guidance)
                if one.w not in own:
                    raise ValueError(f"criteria: w = {one.w:g} is none of the scales {list(own)} of {name!r}")

    @model_validator(mode="after")
    def _images_go_with_captions(self) -> EvaluationSettings:
        sides = [(self.prompts, self.references, "")]
        if self.tuning is not None:
            sides.append((self.tuning.prompts, self.tuning.references, "tuning."))
        scaled_to = self.samples.judging.features.scaled_to
        for prompts, references, prefix in sides:
            by_id = prompts.url and prompts.reading.id_column == "image_id"
            if references.paired and not (by_id and references.url):
                raise ValueError(
                    f"{prefix}references.paired needs {prefix}prompts.url, COCO's annotations, with "
                    f"{prefix}prompts.reading.id_column=image_id, and {prefix}references.url, their images; "
                    f"{prefix}references.paired=false takes captions and images that are no pairs"
                )
            if scaled_to and references.url and references.size != scaled_to:
                raise ValueError(
                    f"{prefix}references.size is {references.size} and samples.judging.features.scaled_to "
                    f"{scaled_to}; give the same, as FID compares images of one size"
                )
        return self

    @model_validator(mode="after")
    def _lpips_has_pairs(self) -> EvaluationSettings:
        if self.lpips is not None and not (self.prompts.draws > 1 and self.samples.drawing.images):
            raise ValueError(
                "lpips compares images of the same caption; give prompts.draws of 2 or more, and "
                "samples.drawing.images=true, which keeps them"
            )
        return self

    @model_validator(mode="after")
    def _tuning_is_apart(self) -> EvaluationSettings:
        families = {contender.name: contender.family for contender in self.contenders if contender.family}
        if self.tuning is None:
            if families:
                raise ValueError(f"contender {next(iter(families))!r} is of a family, which needs tuning")
            return self
        if self.tuning.prompts.name == self.prompts.name:
            raise ValueError(f"prompts and tuning.prompts are both named {self.prompts.name!r}; rename one")
        named = [
            *(self.baseline, *self.also_against),
            *(name for gap in self.gaps for name in (gap.few, gap.many)),
            *(name for one in self.criteria for name in (one.contender, one.against)),
        ]
        for name in named:
            if name in families:
                raise ValueError(f"{name!r} is compared in any case, and cannot be one of a family")
        return self


class TimingSettings(Settings):
    """Settings of a latency measurement.

    Attributes:
        runtime: that executes the networks.
        precision: of the networks.
        device: of the networks.
        threads: CPU threads.
        batch: latents per pass; 2 is one guided image.
        tokens: tokens of an encoded caption; null takes the tokenizer's maximum.
        turns: measurements of each network, in turns with the others.
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
        """File name of the results, without suffix."""
        return f"{self.runtime}-{self.precision}-{self.device}"

    def tokens_of(self, tokenizer: Any) -> int:  # noqa: ANN401 - a tokenizer of transformers
        """Tokens of an encoded caption."""
        return self.tokens or int(tokenizer.model_max_length)


class LatencySettings(TimingSettings):
    """Settings of a latency table."""


class EfficiencySettings(TimingSettings):
    """Settings of an efficiency comparison.

    Attributes:
        batch: latents per pass; guidance evaluates each latent twice, so 2 is one image.
        loop: execute 50 steps of one UNet and 8 of the other; otherwise report steps times the median.
    """

    batch: int = Field(2, ge=2, multiple_of=2)
    loop: bool = True
