"""What the recipes of published Stable Diffusions share: SnapFusion's settings, an accelerator an actor.

The paper takes the hyper-parameters of SD-v1.5 for SD-v2 (Sec. 5.2, Fig. 7d), so they stand here once.
"""

from __future__ import annotations

from jobs.distill_decoder import DecoderSettings
from jobs.distill_steps import DistillSettings
from jobs.evaluation import Evaluation, Prompts
from jobs.evolution import EvolutionSettings
from jobs.finetune_vpred import VpredSettings
from jobs.train_efficient import EfficientSettings
from jobs.train_robust import RobustSettings, RobustTraining
from jobs.training import TrainerSettings
from jobs.watch import WatchSettings
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
from pipelines.stages.sample import Drawing, Sampler
from pipelines.stages.select import Selection
from pipelines.stages.target import Teaching
from pipelines.targets import Targets
from snapfusion.export.request import Licence, MobileSettings
from snapfusion.training.draws import CfgRange
from snapfusion.training.loop import LoopSettings
from snapfusion.training.robust import SkipSettings
from snapfusion.training.steps import StepsSettings

_ON_GPU = Device(kind="cuda", dtype="float16")
_NETWORK = Pool(cpus=1.0, gpus=1.0)
_WRITERS = Pool(actors=2, cpus=1.0)

# Sec. 4.1: two steps of 32 for one of 16; w from [2, 14], p = 0.1 (Fig. 7).
_STEPS, _TEACHER_STEPS = 16, 2
_CFG_RANGE, _CFG_PROBABILITY = CfgRange(low=2.0, high=14.0), 0.1

# Sec. 4.1 and 5: AdamW, weight decay 0.01, batches of 2,048. The paper gives neither learning rate nor
# steps: these are ours, untried at this size.
_LOOP = LoopSettings(
    num_steps=20_000,
    global_batch=2_048,
    learning_rate=1e-5,
    warmup_steps=500,
    weight_decay=0.01,
    decay="constant",
    ema_decay=0.9995,
    precision="bfloat16",
)
_HELD_OUT = LoaderSettings(held_out=0.0001)

_COCO, _CAPTIONS = "coco2014", "s3://bucket/coco/captions-val2014.tsv"
_JUDGING = Judging(
    features=FeatureSettings(
        network="inception", weights="s3://bucket/weights/inception-2015-12-05.safetensors"
    ),
    scorer=ScorerSettings(
        network="ViT-g-14",
        weights="laion/CLIP-ViT-g-14-laion2B-s34B-b88K/open_clip_model.safetensors",
    ),
)
_EVALUATION_ROWS = 2_048


def latents(*, side: int, rows_per_unit: int) -> Latents:
    """LATENTS of pictures of at least `side` pixels, by the bounds of LAION's own aesthetic subset."""
    return Latents(
        # A row that lacks a score is kept.
        selection=Selection(
            min_width=side,
            min_height=side,
            min_aesthetic=5.0,
            max_watermark=0.8,
            max_unsafe=0.5,
            refused_tags=("NSFW",),
        ),
        images=ImageSettings(min_side=side // 2),
        encoding=Encoding(batch_size=32),
        rows_per_unit=rows_per_unit,
        device=_ON_GPU,
        readers=Pool(actors=8, cpus=1.0),
        encoders=_NETWORK,
    )


def pairs(*, rows_per_unit: int) -> Pairs:
    """PAIRS of 50 DDIM steps at guidance 7.5."""
    return Pairs(
        generation=Generation(steps=50, guidance=7.5, batch_size=16),
        rows_per_unit=rows_per_unit,
        device=_ON_GPU,
        teachers=_NETWORK,
        writers=_WRITERS,
    )


def targets() -> Targets:
    """TARGETS of the first stage of distillation."""
    return Targets(
        teaching=Teaching(student_steps=_STEPS, k=_TEACHER_STEPS, cfg_range=_CFG_RANGE, batch_size=32),
        cfg_probability=_CFG_PROBABILITY,
        device=_ON_GPU,
        readers=Pool(cpus=1.0),
        teachers=_NETWORK,
        writers=_WRITERS,
    )


def vpred(*, micro_batch: int) -> VpredSettings:
    """Eq. 6."""
    return VpredSettings(
        loop=_LOOP,
        loader=_HELD_OUT,
        evaluation_rows=_EVALUATION_ROWS,
        gradient_checkpointing=True,
        trainer=_trainer(micro_batch),
        watch=_watch(micro_batch),
    )


def robust(*, begin: str, micro_batch: int) -> RobustSettings:
    """Eq. 5. The paper gives neither probabilities nor steps; these are the miniature's, and ours."""
    return RobustSettings(begin=begin, training=_robustly(micro_batch))


def efficient(*, begin: str, micro_batch: int) -> EfficientSettings:
    """Table 3's UNet, trained by L_ori before its steps are distilled."""
    return EfficientSettings(begin=begin, training=vpred(micro_batch=micro_batch))


def evolution(*, micro_batch: int, batch_size: int, rows_per_unit: int) -> EvolutionSettings:
    """Sec. 3.1: 2,000 captions of MS-COCO's validation set, 50 steps, guidance 7.5, CLIP by ViT-g/14."""
    return EvolutionSettings(
        prompts=Prompts(name=_COCO, url=_CAPTIONS, limit=2_000),
        sampler=Sampler(steps=50),
        guidance=7.5,
        samples=_samples(batch_size=batch_size, rows_per_unit=rows_per_unit),
        training=_robustly(micro_batch),
    )


def distill(*, micro_batch: int) -> DistillSettings:
    """Eq. 11 with p = 0.1 and dynamic gamma 0.2 (Fig. 7)."""
    return DistillSettings(
        name="student-16",
        steps=StepsSettings(
            student_steps=_STEPS,
            k=_TEACHER_STEPS,
            cfg_probability=_CFG_PROBABILITY,
            cfg_range=_CFG_RANGE,
            gamma=0.2,
            gamma_rule="dynamic",
        ),
        teacher_dtype="bfloat16",
        loop=_LOOP,
        loader=_HELD_OUT,
        evaluation_rows=_EVALUATION_ROWS,
        gradient_checkpointing=True,
        trainer=_trainer(micro_batch),
        watch=_watch(micro_batch),
    )


def decoder(*, micro_batch: int) -> DecoderSettings:
    """Sec. 3.2. Steps and batch are ours, for want of the paper's, and untried at this size."""
    return DecoderSettings(
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
        trainer=TrainerSettings(num_workers=8, use_gpu=True, micro_batch=micro_batch),
    )


def evaluation(*, batch_size: int, rows_per_unit: int) -> Evaluation:
    """Sec. 5: MS-COCO 2014's validation captions, CLIP by ViT-g/14. The paper names no kernel for FID."""
    return Evaluation(
        guidance=tuple(1.0 + 0.5 * step for step in range(19)),
        prompts=Prompts(name=_COCO, url=_CAPTIONS, limit=30_000),
        references=References(
            name=_COCO,
            url="s3://bucket/coco/val2014",
            count=30_000,
            device=_ON_GPU,
            describers=_NETWORK,
        ),
        samples=_samples(batch_size=batch_size, rows_per_unit=rows_per_unit),
    )


def _samples(*, batch_size: int, rows_per_unit: int) -> Samples:
    return Samples(
        drawing=Drawing(batch_size=batch_size),
        judging=_JUDGING,
        rows_per_unit=rows_per_unit,
        device=_ON_GPU,
        models=_NETWORK,
    )


def _robustly(micro_batch: int) -> RobustTraining:
    return RobustTraining(
        **dict(vpred(micro_batch=micro_batch)) | {"skip": SkipSettings(attention=0.2, resnet=0.2)}
    )


def _trainer(micro_batch: int) -> TrainerSettings:
    # Of so many, more than the usual two are lost in the days that it takes.
    return TrainerSettings(
        num_workers=64, use_gpu=True, micro_batch=micro_batch, checkpoint_every=500, max_failures=20
    )


def _watch(batch_size: int) -> WatchSettings:
    """What a watch judges by, once `every` is set: one worker draws while the others wait."""
    return WatchSettings(
        prompts=Prompts(name=_COCO, url=_CAPTIONS, limit=512),
        guidance=(7.5,),
        drawing=Drawing(batch_size=batch_size),
        judging=_JUDGING,
        references="run:evaluation/references",
        dtype="bfloat16",
    )


def mobile(*, model: str) -> MobileSettings:
    """Programs of the last student with the half-width decoder.

    The weights' licence is that of Stable Diffusion, whose text and the data's licence are to be given.
    """
    return MobileSettings(
        model=model,
        decoder="run:decoder",
        licence=Licence(weights="CreativeML OpenRAIL-M"),
    )
