"""Recipes: complete runs as typed settings. A variant is a recipe with `--set`."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from jobs.evaluation.settings import EfficiencySettings, EvaluationSettings, LatencySettings
from jobs.evolution.settings import EvolutionSettings, RandomBaselineSettings
from jobs.recipes.ablation import AblationSettings
from jobs.recipes.quota import Quota
from jobs.recipes.stages import Schedule
from jobs.runtime.settings import ClusterSettings, StorageSettings
from jobs.training.settings import (
    DecoderSettings,
    DistillSettings,
    EfficientSettings,
    RobustSettings,
    VpredSettings,
)
from pipelines.datasets.settings import LatentsSettings, PairsSettings, TargetsSettings
from pipelines.dedup.settings import Deduplication
from pipelines.download.settings import DownloadSettings
from pipelines.stages.settings import (
    Blocklists,
)
from snapfusion.export.settings import MobileSettings
from snapfusion.settings import Settings


class SourceSettings(Settings):
    """Where images come from.

    Attributes:
        name: a short name; units and rows are named after it.
        url: img2dataset shards: a tar or Parquet with pictures, a folder of them or a glob. None renders
            scenes into the run.
        blocklists: domains, hashes and terms that are refused.
        sample_rows: how many rows a preview looks at.
        scenes: how many scenes to render if `url` is None.
        scenes_per_shard: of one tar.
        seed: of the scenes.
        table: the place in the run of the LATENTS that they become; another for images of one's own.
    """

    name: str = Field("scenes", pattern=r"^[A-Za-z0-9_.-]+$")
    url: str | None = None
    blocklists: Blocklists = Blocklists()
    sample_rows: int = Field(1_000, ge=1)
    scenes: int = Field(512, ge=1)
    scenes_per_shard: int = Field(128, ge=1)
    seed: int = Field(0, ge=0)
    table: str = Field("latents", pattern=r"^[A-Za-z0-9_.-]+$")


class CaptionsSettings(Settings):
    """Which captions the teacher draws.

    Attributes:
        name: a short name; units are named after it.
        url: a caption list (txt, tsv, csv, jsonl, Parquet); None takes the captions of LATENTS.
        limit: how many of them at most.
    """

    name: str = Field("captions", pattern=r"^[A-Za-z0-9_.-]+$")
    url: str | None = None
    limit: int | None = Field(None, ge=1)


class VacuumSettings(Settings):
    """What `jobs.vacuum` leaves alone.

    Attributes:
        hours: younger files may be about to be committed by a job.
    """

    hours: float = Field(72.0, ge=0.0)


class VerificationSettings(Settings):
    """How a table is verified.

    Attributes:
        units: how many units are computed again.
        seed: which ones.
    """

    units: int = Field(2, ge=0)
    seed: int = Field(0, ge=0)


class Recipe(Settings):
    """A whole run.

    Attributes:
        name: of the recipe it began as.
        model: the teacher, as `snapfusion.models.load` accepts it.
        download: how URL lists become shards.
        source: images.
        latents: how LATENTS are made.
        deduplication: which of their rows count as copies, and whether these are refused.
        captions: what the teacher draws.
        pairs: how PAIRS are made.
        targets: how TARGETS are made.
        vpred: how a model that predicts eps becomes one that predicts v.
        robust: how it learns to bear the loss of blocks.
        efficient: which architecture it gets for the phone, and how that is trained.
        distill: how a student of fewer steps is distilled.
        plans: students to be made one after the other, by the plan's name.
        plan: the name of the one that `jobs.distill_plan` follows; null for none.
        decoder: how the half-width decoder is distilled.
        mobile: how it is compiled.
        evaluation: which models and samplers are compared, and by what.
        ablation: which students `jobs.ablate` trains and compares.
        latency: how the UNet's parts are timed.
        efficiency: how Table 3's UNet and the half-width decoder are held against the model's own.
        evolution: how its architecture is evolved.
        chance: how what evolved is compared with chance.
        oracle_floor: least mean attribute accuracy of the demo's pictures, by the miniature's oracle; None
            for models whose pictures it cannot read.
        verification: how tables are verified.
        vacuum: which files `jobs.vacuum` leaves alone.
        allowance: what one run of `jobs.top_up` may do.
        cluster: where to run.
        storage: how object stores are reached, and where a node has its credentials.
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
    plans: dict[str, Schedule] = Field(default_factory=dict)
    plan: str | None = None
    decoder: DecoderSettings = DecoderSettings()
    mobile: MobileSettings = MobileSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    ablation: AblationSettings = AblationSettings()
    latency: LatencySettings = LatencySettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    evolution: EvolutionSettings = EvolutionSettings()
    chance: RandomBaselineSettings = RandomBaselineSettings()
    oracle_floor: float | None = Field(None, ge=0.0, le=1.0)
    verification: VerificationSettings = VerificationSettings()
    vacuum: VacuumSettings = VacuumSettings()
    allowance: Quota = Quota()
    cluster: ClusterSettings = ClusterSettings()
    storage: StorageSettings = StorageSettings()

    @field_validator("plan")
    @classmethod
    def _plan_is_there(cls, plan: str | None, known: ValidationInfo) -> str | None:
        plans = known.data.get("plans", {})
        if plan is not None and plan not in plans:
            raise ValueError(f"there is no such plan; {', '.join(plans)} are accepted")
        return plan

    @property
    def stages(self) -> Schedule:
        """The stages of the plan."""
        return self.plans[self.plan] if self.plan is not None else ()
