"""Settings of a complete run; a variant is a recipe with `--set`."""

from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from jobs.evaluation.settings import EfficiencySettings, EvaluationSettings, LatencySettings
from jobs.evolution.settings import EvolutionSettings, RandomBaselineSettings
from jobs.recipes.ablation import AblationSettings
from jobs.recipes.stages import Schedule
from jobs.runtime.settings import ClusterSettings, StorageSettings
from jobs.training.settings import (
    DecoderSettings,
    DistillSettings,
    EfficientSettings,
    RobustSettings,
    VpredSettings,
)
from pipelines.datasets.settings import CompactionSettings, LatentsSettings, PairsSettings, TargetsSettings
from pipelines.dedup.settings import Deduplication
from pipelines.download.settings import DownloadSettings
from pipelines.exports.settings import ExportSettings
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.settings import Blocklists
from pipelines.tables.settings import Bounds
from snapfusion.export.settings import MobileSettings
from snapfusion.mini.split import Split
from snapfusion.mini.training.settings import CaptionNoiseSettings
from snapfusion.settings import FOLDER_NAME, Settings

EXAMPLE_BUCKET = "s3://bucket/"
"""Begins the URLs of a recipe that stand for one's own; commands that need them ask for them."""


class SourceSettings(Settings):
    """Settings of the source of images.

    Attributes:
        name: a short name, which begins the names of units and rows.
        url: of img2dataset shards: a tar or Parquet with images, a folder of them or a glob. None renders
            scenes into the run.
        settle: seconds for which a shard that has just changed, and has no `_stats.json` or no end, is left
            to a later run; 0 reads every shard as it is.
        blocklists: refused domains, hashes and terms.
        sample_rows: rows that a preview reads.
        scenes: to render if `url` is None.
        scenes_per_shard: of one tar.
        seed: of the scenes.
        split: of the miniature's captions, whose scenes are rendered; null takes all.
        caption_noise: shares of the scenes' captions with a wrong word or without one, as on the web.
        table: name of their LATENTS in the run; another for one's own images.
    """

    name: str = Field("scenes", pattern=FOLDER_NAME)
    url: str | None = None
    settle: float = Field(600.0, ge=0.0)
    blocklists: Blocklists = Blocklists()
    sample_rows: int = Field(1_000, ge=1)
    scenes: int = Field(512, ge=1)
    scenes_per_shard: int = Field(128, ge=1)
    seed: int = Field(0, ge=0)
    split: Split | None = None
    caption_noise: CaptionNoiseSettings = CaptionNoiseSettings(wrong_word=0.0, missing_word=0.0)
    table: str = Field("latents", pattern=FOLDER_NAME)


class CaptionsSettings(Settings):
    """Settings of the captions from which the teacher generates.

    Attributes:
        name: a short name, which begins the names of units.
        url: of a caption list (txt, tsv, csv, jsonl, json, Parquet); None takes the captions of LATENTS.
        reading: columns of the list.
        limit: on their number.
    """

    name: str = Field("captions", pattern=FOLDER_NAME)
    url: str | None = None
    reading: CaptionSettings = CaptionSettings()
    limit: int | None = Field(None, ge=1)


class VacuumSettings(Settings):
    """Settings of `jobs.vacuum`.

    Attributes:
        hours: younger files are kept, as a running job may be about to commit them.
    """

    hours: float = Field(72.0, ge=0.0)


class VerificationSettings(Settings):
    """Settings of the verification of a table.

    Attributes:
        units: number of units that are computed again.
        seed: of their choice.
    """

    units: int = Field(2, ge=0)
    seed: int = Field(0, ge=0)


class Quota(Settings):
    """Bounds of one run of `jobs.top_up`, which ends at the first one reached; None is no bound.

    Attributes:
        rows: to read, rounded up to whole units.
        minutes: of work, from its submission to the cluster.
        budget: in the currency of `price_per_hour`.
        price_per_hour: of everything that runs meanwhile; converts the budget into minutes.
    """

    rows: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0.0)
    budget: float | None = Field(None, gt=0.0)
    price_per_hour: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> Self:
        if (self.budget is None) != (self.price_per_hour is None):
            raise ValueError("budget and price_per_hour must be given together")
        return self

    @property
    def seconds(self) -> float | None:
        """The shorter of `minutes` and the time that the budget pays, in seconds."""
        limits = [60 * self.minutes] if self.minutes is not None else []
        if self.budget is not None and self.price_per_hour is not None:
            limits.append(3600 * self.budget / self.price_per_hour)
        return min(limits, default=None)

    def bound(self, bounds: Bounds) -> Bounds:
        """A table's bounds, with these."""
        return bounds.model_copy(update={"max_rows": self.rows, "max_seconds": self.seconds})


class Recipe(Settings):
    """Settings of a complete run.

    Attributes:
        name: of the recipe.
        model: the teacher's source, as `snapfusion.models.load` accepts it.
        download: of URL lists into shards.
        source: of images.
        latents: the table LATENTS.
        deduplication: criteria of copies among its rows, and whether they are refused.
        captions: from which the teacher generates.
        pairs: the table PAIRS.
        targets: the table TARGETS.
        vpred: fine-tuning of an eps-prediction model to v-prediction.
        robust: robust training, which drops blocks at random.
        efficient: architecture of the efficient UNet, and its training.
        distill: step distillation of one student.
        schedules: students distilled one after the other, by the schedule's name.
        schedule: name of the one that `jobs.distill_schedule` follows; null for none.
        decoder: distillation of the half-width decoder.
        mobile: compilation for phones.
        evaluation: compared models and samplers, and the metrics.
        ablation: students that `jobs.ablate` trains and compares.
        latency: timing of the UNet's parts.
        efficiency: comparison of the efficient UNet and the half-width decoder with the model's own.
        evolution: architecture search.
        random_baseline: comparison of the evolved architecture with random ones.
        oracle_floor: least mean attribute accuracy of the demo's images, by the miniature's oracle; None
            for models whose images it cannot read.
        verification: of tables.
        export: of tables, in layouts of other training programs.
        compaction: of tables into larger files.
        vacuum: age of the files that `jobs.vacuum` keeps.
        quota: bounds of one run of `jobs.top_up`.
        cluster: Ray.
        storage: object stores and the file of credentials.
    """

    name: str
    model: str
    download: DownloadSettings = DownloadSettings()
    source: SourceSettings = SourceSettings()
    latents: LatentsSettings = LatentsSettings()
    deduplication: Deduplication = Deduplication()
    captions: CaptionsSettings = CaptionsSettings()
    pairs: PairsSettings = PairsSettings()
    targets: TargetsSettings = TargetsSettings()
    vpred: VpredSettings = VpredSettings()
    robust: RobustSettings = RobustSettings()
    efficient: EfficientSettings = EfficientSettings()
    distill: DistillSettings = DistillSettings()
    schedules: dict[str, Schedule] = Field(default_factory=dict)
    schedule: str | None = None
    decoder: DecoderSettings = DecoderSettings()
    mobile: MobileSettings = MobileSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    ablation: AblationSettings = AblationSettings()
    latency: LatencySettings = LatencySettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    evolution: EvolutionSettings = EvolutionSettings()
    random_baseline: RandomBaselineSettings = RandomBaselineSettings()
    oracle_floor: float | None = Field(None, ge=0.0, le=1.0)
    verification: VerificationSettings = VerificationSettings()
    export: ExportSettings = ExportSettings()
    compaction: CompactionSettings = CompactionSettings()
    vacuum: VacuumSettings = VacuumSettings()
    quota: Quota = Quota()
    cluster: ClusterSettings = ClusterSettings()
    storage: StorageSettings = StorageSettings()

    @field_validator("schedule")
    @classmethod
    def _schedule_exists(cls, schedule: str | None, info: ValidationInfo) -> str | None:
        schedules = info.data.get("schedules", {})
        if schedule is not None and schedule not in schedules:
            raise ValueError(f"there is no such schedule; accepted are {', '.join(schedules)}")
        return schedule

    @property
    def stages(self) -> Schedule:
        """Stages of the recipe's schedule."""
        return self.schedules[self.schedule] if self.schedule is not None else ()
