"""Recipes of the published Stable Diffusions, with an accelerator per actor.

The paper takes the hyper-parameters of SD-v1.5 for SD-v2 (Sec. 5.2, Fig. 7d), so one function makes both.
"""

from __future__ import annotations

from jobs.evaluation.settings import EfficiencySettings, EvaluationSettings, LatencySettings, PromptSettings
from jobs.evolution.settings import EvolutionSettings
from jobs.recipes.recipe import Recipe, SourceSettings
from jobs.recipes.stages import Schedule, paper_schedules
from jobs.training.settings import (
    DecoderSettings,
    DistillSettings,
    EfficientSettings,
    RobustSettings,
    RobustTrainingSettings,
    TrainerSettings,
    ValidationSettings,
    VpredSettings,
)
from jobs.training.sources import EFFICIENT_MODEL, RECIPE_MODEL, VPRED_MODEL
from pipelines.datasets.settings import (
    LatentsSettings,
    PairsSettings,
    ReferencesSettings,
    SamplesSettings,
    TargetsSettings,
)
from pipelines.download.settings import DownloadSettings, FetchSettings
from pipelines.loading.settings import LoaderSettings
from pipelines.ray_data.settings import Pool
from pipelines.stages.settings import (
    Device,
    Encoding,
    FeatureSettings,
    Generation,
    ImageSettings,
    MetricSettings,
    Sampler,
    SamplingSettings,
    ScorerSettings,
    Selection,
    TeacherSettings,
)
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.training.settings import CfgRange, LoopSettings, SkipSettings, StepDistillationSettings

_ON_GPU = Device(kind="cuda", dtype="float16")
_NETWORK = Pool(cpus=1.0, gpus=1.0)
_WRITERS = Pool(actors=2, cpus=1.0)

# Sec. 4.1: two steps of 32 for one of 16; w from [2, 14], p = 0.1 (Fig. 7).
_STEPS, _K = 16, 2
_CFG_RANGE, _CFG_PROBABILITY = CfgRange(low=2.0, high=14.0), 0.1

# Sec. 4.1 and 5: AdamW, weight decay 0.01, batches of 2,048. The paper gives neither learning rate nor
# steps: these are ours, untested at this size.
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
_METRICS = MetricSettings(
    features=FeatureSettings(
        network="inception", weights="s3://bucket/weights/inception-2015-12-05.safetensors"
    ),
    scorer=ScorerSettings(
        network="ViT-g-14",
        weights="laion/CLIP-ViT-g-14-laion2B-s34B-b88K/open_clip_model.safetensors",
    ),
)
_EVALUATION_ROWS = 2_048


def sd15() -> Recipe:
    """SD-v1.5 as in the paper: 512 px, 50 DDIM steps, guidance 7.5."""
    return _stable_diffusion(
        "sd15",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        side=512,
        micro_batch=8,
        v_model=VPRED_MODEL,
        # The efficient UNet's first teacher is SD-v1.5 ("the same strategy", the paper says no more).
        schedules=paper_schedules(VPRED_MODEL, small=EFFICIENT_MODEL),
    )


def sd2() -> Recipe:
    """SD-v2 by SD-v1.5's hyper-parameters (Fig. 7d). SD-v2.1 of 768 px predicts v already."""
    return _stable_diffusion(
        "sd2",
        model="stabilityai/stable-diffusion-2-1",
        side=768,
        # An image has 2.25 times the pixels of one of 512 px, so a unit and a batch have half the rows.
        micro_batch=4,
        v_model=RECIPE_MODEL,
        schedules=paper_schedules(RECIPE_MODEL),
    )


def _stable_diffusion(
    name: str, *, model: str, side: int, micro_batch: int, v_model: str, schedules: dict[str, Schedule]
) -> Recipe:
    """A recipe of one image size; `v_model` is the source of its v-prediction model."""
    vpred = _velocity(micro_batch)
    robust = RobustTrainingSettings(**dict(vpred) | {"skip": SkipSettings(attention=0.2, resnet=0.2)})
    samples = SamplesSettings(
        drawing=SamplingSettings(batch_size=2 * micro_batch),
        judging=_METRICS,
        rows_per_unit=16 * micro_batch,
        device=_ON_GPU,
        models=_NETWORK,
    )
    return Recipe(
        name=name,
        model=model,
        download=DownloadSettings(fetching=FetchSettings(image_size=side)),
        source=SourceSettings(name="laion", url="s3://bucket/laion/*.tar"),
        latents=_latents(side=side, rows_per_unit=16 * micro_batch),
        pairs=PairsSettings(
            generation=Generation(steps=50, guidance=7.5, batch_size=16),
            rows_per_unit=16 * micro_batch,
            device=_ON_GPU,
            teachers=_NETWORK,
            writers=_WRITERS,
        ),
        targets=_targets(),
        vpred=vpred,
        # Eq. 5. The paper gives neither probabilities nor steps; these are the miniature's, and ours.
        robust=RobustSettings(begin=v_model, training=robust),
        efficient=EfficientSettings(begin=v_model, training=vpred),
        # Sec. 3.1: 2,000 captions of MS-COCO's validation set, 50 steps, guidance 7.5, CLIP by ViT-g/14.
        evolution=EvolutionSettings(
            prompts=PromptSettings(name=_COCO, url=_CAPTIONS, limit=2_000),
            sampler=Sampler(steps=50),
            guidance=7.5,
            samples=samples,
            training=robust,
        ),
        distill=_distill(micro_batch),
        schedule="staged",
        schedules=schedules,
        decoder=_decoder(micro_batch),
        # The weights' licence is Stable Diffusion's; its text and the data's licence must be given.
        mobile=MobileSettings(
            model="run:staged-8/model",
            decoder="run:decoder",
            licence=Licence(weights="CreativeML OpenRAIL-M"),
        ),
        latency=LatencySettings(device="cuda", precision="float16"),
        efficiency=EfficiencySettings(device="cuda"),
        evaluation=_evaluation(samples),
    )


def _latents(*, side: int, rows_per_unit: int) -> LatentsSettings:
    """LATENTS of images of at least `side` pixels, within the bounds of LAION's own aesthetic subset."""
    return LatentsSettings(
        # A row without a score is kept.
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


def _targets() -> TargetsSettings:
    """TARGETS of the first stage of distillation."""
    return TargetsSettings(
        teaching=TeacherSettings(student_steps=_STEPS, k=_K, cfg_range=_CFG_RANGE, batch_size=32),
        cfg_probability=_CFG_PROBABILITY,
        device=_ON_GPU,
        readers=Pool(cpus=1.0),
        teachers=_NETWORK,
        writers=_WRITERS,
    )


def _velocity(micro_batch: int) -> VpredSettings:
    """Eq. 6."""
    return VpredSettings(
        loop=_LOOP,
        loader=_HELD_OUT,
        evaluation_rows=_EVALUATION_ROWS,
        gradient_checkpointing=True,
        trainer=_trainer(micro_batch),
        validation=_validation(micro_batch),
    )


def _distill(micro_batch: int) -> DistillSettings:
    """Eq. 11 with p = 0.1 and dynamic gamma 0.2 (Fig. 7)."""
    return DistillSettings(
        name="student-16",
        steps=StepDistillationSettings(
            student_steps=_STEPS,
            k=_K,
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
        validation=_validation(micro_batch),
    )


def _decoder(micro_batch: int) -> DecoderSettings:
    """Sec. 3.2. The paper gives neither steps nor batch: these are ours, untested at this size."""
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


def _evaluation(samples: SamplesSettings) -> EvaluationSettings:
    """Sec. 5: MS-COCO 2014's validation captions, CLIP by ViT-g/14. The paper names no kernel for FID."""
    return EvaluationSettings(
        guidance=tuple(1.0 + 0.5 * step for step in range(19)),
        prompts=PromptSettings(name=_COCO, url=_CAPTIONS, limit=30_000),
        references=ReferencesSettings(
            name=_COCO,
            url="s3://bucket/coco/val2014",
            count=30_000,
            device=_ON_GPU,
            describers=_NETWORK,
        ),
        samples=samples,
    )


def _trainer(micro_batch: int) -> TrainerSettings:
    # More of 64 workers are lost in days of training than the default of two restarts allows.
    return TrainerSettings(
        num_workers=64, use_gpu=True, micro_batch=micro_batch, checkpoint_every=500, max_failures=20
    )


def _validation(batch_size: int) -> ValidationSettings:
    """Settings that apply once `every` is set: one worker samples while the others wait."""
    return ValidationSettings(
        prompts=PromptSettings(name=_COCO, url=_CAPTIONS, limit=512),
        guidance=(7.5,),
        drawing=SamplingSettings(batch_size=batch_size),
        judging=_METRICS,
        references="run:evaluation/references",
        dtype="bfloat16",
    )
