"""Recipes: complete runs as typed settings. A variant is a recipe with `--set`."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from jobs import full_size
from jobs.ablation import Ablation, miniature_ablation
from jobs.allowance import Allowance
from jobs.chance import ChanceSettings
from jobs.cluster import Cluster
from jobs.credentials import Storage
from jobs.distill_decoder import DecoderSettings
from jobs.distill_steps import DistillSettings
from jobs.evaluation import Contender, Evaluation, Prompts
from jobs.evolution import EvolutionSettings
from jobs.finetune_vpred import VpredSettings
from jobs.measure_efficiency import EfficiencySettings
from jobs.measure_latency import LatencySettings
from jobs.plans import EFFICIENT, OWN, VPRED, Plan, PlanStage, plans
from jobs.train_efficient import EfficientSettings
from jobs.train_robust import RobustSettings, RobustTraining
from jobs.training import TrainerSettings
from pipelines.downloads import Downloads
from pipelines.duplicates import Deduplication
from pipelines.execution import Pool
from pipelines.latents import Latents
from pipelines.pairs import Pairs
from pipelines.references import References
from pipelines.samples import Samples
from pipelines.stages.blocklist import Blocklists
from pipelines.stages.encode import Encoding
from pipelines.stages.generate import Generation
from pipelines.stages.image import ImageSettings
from pipelines.stages.img2dataset import Fetching
from pipelines.stages.sample import Drawing, Sampler
from pipelines.stages.target import Teaching
from pipelines.targets import Targets
from snapfusion.export.request import Licence, MobileSettings
from snapfusion.settings import Settings, SettingsError
from snapfusion.training.draws import CfgRange
from snapfusion.training.loop import LoopSettings
from snapfusion.training.robust import SkipSettings
from snapfusion.training.steps import StepsSettings


class Source(Settings):
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


class Captions(Settings):
    """Which captions the teacher draws.

    Attributes:
        name: a short name; units are named after it.
        url: a caption list (txt, tsv, csv, jsonl, Parquet); None takes the captions of LATENTS.
        limit: how many of them at most.
    """

    name: str = Field("captions", pattern=r"^[A-Za-z0-9_.-]+$")
    url: str | None = None
    limit: int | None = Field(None, ge=1)


class Vacuum(Settings):
    """What `jobs.vacuum` leaves alone.

    Attributes:
        hours: younger files may be about to be committed by a job.
    """

    hours: float = Field(72.0, ge=0.0)


class Verification(Settings):
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
    download: Downloads = Downloads()
    source: Source = Source()
    latents: Latents = Latents()
    deduplication: Deduplication = Deduplication()
    captions: Captions = Captions()
    pairs: Pairs = Pairs()
    targets: Targets = Targets()
    vpred: VpredSettings = VpredSettings()
    robust: RobustSettings = RobustSettings()
    efficient: EfficientSettings = EfficientSettings()
    distill: DistillSettings = DistillSettings()
    plans: dict[str, Plan] = Field(default_factory=dict)
    plan: str | None = None
    decoder: DecoderSettings = DecoderSettings()
    mobile: MobileSettings = MobileSettings()
    evaluation: Evaluation = Evaluation()
    ablation: Ablation = Ablation()
    latency: LatencySettings = LatencySettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    evolution: EvolutionSettings = EvolutionSettings()
    chance: ChanceSettings = ChanceSettings()
    oracle_floor: float | None = Field(None, ge=0.0, le=1.0)
    verification: Verification = Verification()
    vacuum: Vacuum = Vacuum()
    allowance: Allowance = Allowance()
    cluster: Cluster = Cluster()
    storage: Storage = Storage()

    @field_validator("plan")
    @classmethod
    def _plan_is_there(cls, plan: str | None, known: ValidationInfo) -> str | None:
        plans = known.data.get("plans", {})
        if plan is not None and plan not in plans:
            raise ValueError(f"there is no such plan; {', '.join(plans)} are accepted")
        return plan

    @property
    def stages(self) -> Plan:
        """The stages of the plan."""
        return self.plans[self.plan] if self.plan is not None else ()


def mini() -> Recipe:
    """The bundled miniature, every stage real, on two cores in minutes."""
    return Recipe(
        name="mini",
        model="mini",
        source=Source(),
        latents=Latents(
            images=ImageSettings(min_side=16),
            encoding=Encoding(batch_size=32),
            rows_per_unit=64,
        ),
        pairs=Pairs(
            generation=Generation(steps=50, guidance=2.5, batch_size=32),
            rows_per_unit=32,
            teachers=Pool(actors=2, cpus=0.5),
            writers=Pool(cpus=0.25),
        ),
        targets=Targets(
            # The miniature's useful range of w is narrower than SD-v1.5's.
            teaching=Teaching(student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), batch_size=32),
            draws=10,
            cfg_probability=0.5,
            teachers=Pool(actors=2, cpus=0.5),
        ),
        # With 0.2 the loss of a whole group of blocks costs a third of what it costs a model trained plainly
        # (docs/efficient_unet.md).
        robust=RobustSettings(
            begin="mini-v",
            training=RobustTraining(
                skip=SkipSettings(attention=0.2, resnet=0.2),
                loop=_further(num_steps=1_500),
                trainer=TrainerSettings(micro_batch=64),
            ),
        ),
        efficient=EfficientSettings(
            begin="mini-v",
            training=VpredSettings(loop=_further(num_steps=300), trainer=TrainerSettings(micro_batch=64)),
        ),
        evolution=EvolutionSettings(
            guidance=3.0,
            sampler=Sampler(steps=8),
            samples=Samples(drawing=Drawing(batch_size=100, images=True), models=Pool(actors=2, cpus=0.5)),
            training=RobustTraining(
                skip=SkipSettings(attention=0.2, resnet=0.2),
                loop=_further(num_steps=200),
                trainer=TrainerSettings(micro_batch=64),
            ),
        ),
        chance=ChanceSettings(
            training=VpredSettings(loop=_further(num_steps=400), trainer=TrainerSettings(micro_batch=64)),
            evaluation=Evaluation(
                guidance=(2.0, 4.0), prompts=Prompts(limit=500), references=References(count=4_000)
            ),
        ),
        # At 8 steps the miniature is hardly worse than at 50; at 4 there is something to learn.
        distill=DistillSettings(
            name="student",
            teacher="mini-v",
            student=EFFICIENT,
            steps=StepsSettings(
                student_steps=4, k=2, cfg_probability=0.5, cfg_range=CfgRange(low=1.0, high=6.0)
            ),
            loop=LoopSettings(
                num_steps=200, global_batch=32, learning_rate=3e-4, warmup_steps=20, ema_decay=0.98
            ),
            trainer=TrainerSettings(micro_batch=32, curve_every=5),
        ),
        # Half the steps at a time, from the bundled model that predicts v: 8 are hardly worse than 50.
        plan="halving",
        plans={
            "halving": (
                PlanStage(name="student-8", teacher="mini-v", student="mini-v", student_steps=8),
                PlanStage(
                    name="student-4",
                    teacher="run:student-8/model",
                    student="run:student-8/model",
                    student_steps=4,
                ),
            ),
            **plans("mini-v", small=EFFICIENT),
        },
        mobile=MobileSettings(
            model="run:student/model",
            decoder="run:decoder",
            guidance=4.0,
            captions=(
                "a large red circle at the top on a white background",
                "a small blue ring on the left on a white background",
                "a large green cross at the bottom on a gray background",
            ),
            licence=Licence(
                weights="Apache-2.0 (the miniature of this repository)",
                data="Apache-2.0 (scenes drawn by this repository)",
            ),
        ),
        # 1.00 on the 512 pictures of the demo (metrics.json, "oracle").
        oracle_floor=0.95,
    )


def _further(*, num_steps: int) -> LoopSettings:
    """The optimizer's settings for a miniature that is trained on."""
    return LoopSettings(
        num_steps=num_steps, global_batch=64, learning_rate=5e-4, warmup_steps=50, ema_decay=0.99
    )


def ablation() -> Recipe:
    """The ablations of Fig. 6 and 7 on the miniature: hours of two cores, in as many sittings as wanted."""
    base = mini()
    latents = base.latents.model_copy(update={"rows_per_unit": 128})
    distill = base.distill.model_copy(
        update={
            "student": None,
            "loop": LoopSettings(
                num_steps=300, global_batch=32, learning_rate=1e-4, warmup_steps=20, ema_decay=0.98
            ),
            "trainer": TrainerSettings(micro_batch=32),
        }
    )
    return base.model_copy(
        update={
            "name": "ablation",
            "source": Source(scenes=4_096, scenes_per_shard=512, seed=7),
            "latents": latents,
            "distill": distill,
            "evaluation": Evaluation(
                guidance=tuple(1.0 + 0.5 * step for step in range(13)),
                prompts=Prompts(limit=500),
                references=References(count=4_000),
            ),
            "ablation": miniature_ablation(),
        }
    )


def twin() -> Recipe:
    """Table 3's twin of the miniature: its students of fewer steps (Fig. 4), by both decoders (Fig. 8)."""
    base = ablation()

    def of(name: str, *, steps: int, made: str = "", decoder: str | None = None) -> Contender:
        return Contender(
            name=name, model=f"run:{made or name}/model", sampler=Sampler(steps=steps), decoder=decoder
        )

    return base.model_copy(
        update={
            "name": "twin",
            "efficient": EfficientSettings(
                begin="mini-v",
                training=VpredSettings(
                    loop=_further(num_steps=1_500), trainer=TrainerSettings(micro_batch=64)
                ),
            ),
            "captions": Captions(limit=512),
            "plan": "staged",
            "evaluation": Evaluation(
                contenders=(
                    of("twin-8", steps=8, made="efficient"),
                    of("twin-16", steps=16, made="efficient"),
                    *(of(f"{plan}-8", steps=8) for plan in ("vanilla", "self", "plain", "staged")),
                    of("staged-8-half", steps=8, made="staged-8", decoder="run:decoder"),
                ),
                baseline="twin-8",
                also_against=("staged-8",),
                guidance=(1.0, 2.0, 3.0, 4.0, 6.0),
                prompts=Prompts(limit=500),
                references=References(count=4_000),
            ),
        }
    )


def sd15() -> Recipe:
    """SD-v1.5 as in the paper: 512 px, 50 DDIM steps, guidance 7.5; one accelerator an actor."""
    return Recipe(
        name="sd15",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        source=Source(name="laion", url="s3://bucket/laion/*.tar"),
        latents=full_size.latents(side=512, rows_per_unit=128),
        pairs=full_size.pairs(rows_per_unit=128),
        targets=full_size.targets(),
        vpred=full_size.vpred(micro_batch=8),
        robust=full_size.robust(begin=VPRED, micro_batch=8),
        efficient=full_size.efficient(begin=VPRED, micro_batch=8),
        evolution=full_size.evolution(micro_batch=8, batch_size=16, rows_per_unit=128),
        distill=full_size.distill(micro_batch=8),
        plan="staged",
        # The efficient UNet's first teacher is SD-v1.5 ("the same strategy", no more is said).
        plans=plans(VPRED, small=EFFICIENT),
        decoder=full_size.decoder(micro_batch=8),
        mobile=full_size.mobile(model="run:staged-8/model"),
        latency=LatencySettings(device="cuda", precision="float16"),
        efficiency=EfficiencySettings(device="cuda"),
        evaluation=full_size.evaluation(batch_size=16, rows_per_unit=128),
    )


def sd2() -> Recipe:
    """SD-v2 by SD-v1.5's hyper-parameters (Fig. 7d). SD-v2.1 of 768 px predicts v as it is."""
    return Recipe(
        name="sd2",
        model="stabilityai/stable-diffusion-2-1",
        download=Downloads(fetching=Fetching(image_size=768)),
        source=Source(name="laion", url="s3://bucket/laion/*.tar"),
        # A picture has 2.25 times the pixels of one of 512 px, so a unit and a batch have half the rows.
        latents=full_size.latents(side=768, rows_per_unit=64),
        pairs=full_size.pairs(rows_per_unit=64),
        targets=full_size.targets(),
        vpred=full_size.vpred(micro_batch=4),
        robust=full_size.robust(begin=OWN, micro_batch=4),
        efficient=full_size.efficient(begin=OWN, micro_batch=4),
        evolution=full_size.evolution(micro_batch=4, batch_size=8, rows_per_unit=64),
        distill=full_size.distill(micro_batch=4),
        plan="staged",
        plans=plans(OWN),
        decoder=full_size.decoder(micro_batch=4),
        mobile=full_size.mobile(model="run:staged-8/model"),
        latency=LatencySettings(device="cuda", precision="float16"),
        efficiency=EfficiencySettings(device="cuda"),
        evaluation=full_size.evaluation(batch_size=8, rows_per_unit=64),
    )


RECIPES = {"mini": mini, "ablation": ablation, "twin": twin, "sd15": sd15, "sd2": sd2}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SettingsError: if there is none.
    """
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: there is no such recipe; {', '.join(RECIPES)} are accepted")
    return RECIPES[name]()
