"""Recipes: complete runs as typed settings. A variant is a recipe with `--set`."""

from __future__ import annotations

from pydantic import Field

from jobs.cluster import Cluster
from jobs.compile_mobile import MobileSettings
from jobs.distill_decoder import DecoderSettings
from jobs.distill_steps import DistillSettings
from jobs.evaluation import Evaluation, Prompts
from jobs.finetune_vpred import VpredSettings
from jobs.trainer import TrainerSettings
from pipelines.execution import Pool
from pipelines.latents import Latents
from pipelines.loader import LoaderSettings
from pipelines.pairs import Pairs
from pipelines.references import References
from pipelines.samples import Samples
from pipelines.stages.encode import Encoding
from pipelines.stages.environment import Device
from pipelines.stages.generate import Generation
from pipelines.stages.image import ImageSettings
from pipelines.stages.judge import FeatureSettings, Judging, ScorerSettings
from pipelines.stages.sample import Drawing
from pipelines.stages.select import Selection
from pipelines.stages.target import Teaching
from pipelines.targets import Targets
from snapfusion.settings import Settings, SettingsError
from snapfusion.training.draws import CfgRange
from snapfusion.training.loop import LoopSettings
from snapfusion.training.steps import StepsSettings


class Source(Settings):
    """Where images come from.

    Attributes:
        name: a short name; units and rows are named after it.
        url: img2dataset shards: a tar, a folder of them or a glob. None renders scenes into the run.
        scenes: how many scenes to render if `url` is None.
        scenes_per_shard: of one tar.
        seed: of the scenes.
    """

    name: str = Field("scenes", pattern=r"^[A-Za-z0-9_.-]+$")
    url: str | None = None
    scenes: int = Field(512, ge=1)
    scenes_per_shard: int = Field(128, ge=1)
    seed: int = Field(0, ge=0)


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


class Verification(Settings):
    """How a table is verified.

    Attributes:
        units: how many units are computed again.
        seed: which ones.
    """

    units: int = Field(2, ge=0)
    seed: int = Field(0, ge=0)


class PlanStage(Settings):
    """One stage of step distillation; all else is as `Recipe.distill` says.

    Attributes:
        name: of the student's folder in the run.
        teacher: its source, or "run:" and a place in the run.
        student: the source of its first weights, likewise.
        student_steps: N_S, the steps that the student takes.
        k: the teacher's steps for one of the student's.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    teacher: str
    student: str
    student_steps: int = Field(ge=1)
    k: int = Field(2, ge=1)


class Recipe(Settings):
    """A whole run.

    Attributes:
        name: of the recipe it began as.
        model: the teacher, as `snapfusion.models.load` accepts it.
        source: images.
        latents: how LATENTS are made.
        captions: what the teacher draws.
        pairs: how PAIRS are made.
        targets: how TARGETS are made.
        vpred: how a model that predicts eps becomes one that predicts v.
        distill: how a student of fewer steps is distilled.
        plan: the students that `jobs.distill_plan` makes, in this order.
        decoder: how the half-width decoder is distilled.
        mobile: how it is compiled.
        evaluation: which models and samplers are compared, and by what.
        oracle_floor: least mean attribute accuracy of the demo's pictures, by the miniature's oracle; None
            for models whose pictures it cannot read.
        verification: how tables are verified.
        cluster: where to run.
    """

    name: str
    model: str
    source: Source = Source()
    latents: Latents = Latents()
    captions: Captions = Captions()
    pairs: Pairs = Pairs()
    targets: Targets = Targets()
    vpred: VpredSettings = VpredSettings()
    distill: DistillSettings = DistillSettings()
    plan: tuple[PlanStage, ...] = ()
    decoder: DecoderSettings = DecoderSettings()
    mobile: MobileSettings = MobileSettings()
    evaluation: Evaluation = Evaluation()
    oracle_floor: float | None = Field(None, ge=0.0, le=1.0)
    verification: Verification = Verification()
    cluster: Cluster = Cluster()


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
            teaching=Teaching(student_steps=8, k=2, cfg_range=CfgRange(low=1.0, high=6.0), batch_size=32),
            draws=10,
            cfg_probability=0.3,
            teachers=Pool(actors=2, cpus=0.5),
        ),
        distill=DistillSettings(
            steps=StepsSettings(
                student_steps=8, k=2, cfg_probability=0.3, cfg_range=CfgRange(low=1.0, high=6.0)
            ),
        ),
        # Half the steps at a time, from the bundled model that predicts v.
        plan=(
            PlanStage(name="student-8", teacher="mini-v", student="mini-v", student_steps=8),
            PlanStage(
                name="student-4",
                teacher="run:student-8/model",
                student="run:student-8/model",
                student_steps=4,
            ),
        ),
        # 1.00 on the 512 pictures of the demo (metrics.json, "oracle").
        oracle_floor=0.95,
    )


def sd15() -> Recipe:
    """SD-v1.5 as in the paper: 512 px, 50 DDIM steps, guidance 7.5; one accelerator an actor."""
    on_gpu = Device(kind="cuda", dtype="float16")
    # Sec. 4.1 and 5: AdamW, weight decay 0.01, batches of 2,048. The paper gives neither learning rate nor
    # steps: these are ours, untried at this size.
    loop = LoopSettings(
        num_steps=20_000,
        global_batch=2_048,
        learning_rate=1e-5,
        warmup_steps=500,
        decay="constant",
        ema_decay=0.9995,
        precision="bfloat16",
    )
    trainer = TrainerSettings(num_workers=64, use_gpu=True, micro_batch=8, checkpoint_every=500)
    return Recipe(
        name="sd15",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        source=Source(name="laion", url="s3://bucket/laion/*.tar"),
        latents=Latents(
            # The bounds of LAION's own aesthetic subset; a row that lacks a score is kept.
            selection=Selection(
                min_width=512,
                min_height=512,
                min_aesthetic=5.0,
                max_watermark=0.8,
                max_unsafe=0.5,
                refused_tags=("NSFW",),
            ),
            images=ImageSettings(min_side=256),
            encoding=Encoding(batch_size=32),
            rows_per_unit=128,
            device=on_gpu,
            readers=Pool(actors=8, cpus=1.0),
            encoders=Pool(cpus=1.0, gpus=1.0),
        ),
        pairs=Pairs(
            generation=Generation(steps=50, guidance=7.5, batch_size=16),
            rows_per_unit=128,
            device=on_gpu,
            teachers=Pool(cpus=1.0, gpus=1.0),
            writers=Pool(actors=2, cpus=1.0),
        ),
        # Sec. 4.1: two of 32 steps for one of 16; w from [2, 14], p = 0.1 (Fig. 7).
        targets=Targets(
            teaching=Teaching(student_steps=16, k=2, cfg_range=CfgRange(low=2.0, high=14.0), batch_size=32),
            cfg_probability=0.1,
            device=on_gpu,
            readers=Pool(cpus=1.0),
            teachers=Pool(cpus=1.0, gpus=1.0),
            writers=Pool(actors=2, cpus=1.0),
        ),
        # Eq. 11 with p = 0.1 and dynamic gamma 0.2 (Fig. 7).
        vpred=VpredSettings(
            loop=loop,
            loader=LoaderSettings(held_out=0.0001),
            evaluation_rows=2_048,
            gradient_checkpointing=True,
            trainer=trainer,
        ),
        distill=DistillSettings(
            name="student-16",
            steps=StepsSettings(
                student_steps=16, k=2, cfg_probability=0.1, cfg_range=CfgRange(low=2.0, high=14.0), gamma=0.2
            ),
            teacher_dtype="bfloat16",
            loop=loop,
            loader=LoaderSettings(held_out=0.0001),
            evaluation_rows=2_048,
            gradient_checkpointing=True,
            trainer=trainer,
        ),
        # Sec. 4.1. The efficient UNet does not exist here yet: `small-16` begins as SD-v1.5's own, and is
        # taught by it ("the same strategy", no more is said). The last teacher is App. D's best.
        plan=(
            PlanStage(
                name="teacher-16", teacher="run:vpred/model", student="run:vpred/model", student_steps=16
            ),
            PlanStage(
                name="small-16", teacher="run:vpred/model", student="run:vpred/model", student_steps=16
            ),
            PlanStage(
                name="student-8",
                teacher="run:teacher-16/model",
                student="run:small-16/model",
                student_steps=8,
            ),
        ),
        decoder=DecoderSettings(
            # The paper gives neither steps nor batch for the decoder: these are ours, untried at this size.
            target="online",
            loop=LoopSettings(
                num_steps=20_000,
                global_batch=64,
                learning_rate=2e-4,
                warmup_steps=500,
                ema_decay=0.999,
                precision="bfloat16",
            ),
            loader=LoaderSettings(held_out=0.01),
            compare_random_init=False,
            trainer=TrainerSettings(num_workers=8, use_gpu=True, micro_batch=8),
        ),
        evaluation=Evaluation(
            # Sec. 5: MS-COCO 2014's validation captions, CLIP by ViT-g/14. The paper names no kernel for FID.
            guidance=tuple(1.0 + 0.5 * step for step in range(19)),
            prompts=Prompts(name="coco2014", url="s3://bucket/coco/captions-val2014.tsv", limit=30_000),
            references=References(
                name="coco2014",
                url="s3://bucket/coco/val2014",
                count=30_000,
                device=on_gpu,
                describers=Pool(cpus=1.0, gpus=1.0),
            ),
            samples=Samples(
                drawing=Drawing(batch_size=16),
                judging=Judging(
                    features=FeatureSettings(
                        network="inception", weights="s3://bucket/weights/inception-2015-12-05.safetensors"
                    ),
                    scorer=ScorerSettings(
                        network="ViT-g-14",
                        weights="laion/CLIP-ViT-g-14-laion2B-s34B-b88K/open_clip_model.safetensors",
                    ),
                ),
                rows_per_unit=128,
                device=on_gpu,
                models=Pool(cpus=1.0, gpus=1.0),
            ),
        ),
    )


RECIPES = {"mini": mini, "sd15": sd15}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SettingsError: if there is none.
    """
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: there is no such recipe; {' and '.join(RECIPES)} are accepted")
    return RECIPES[name]()
