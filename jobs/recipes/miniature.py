"""Recipes of the bundled miniature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings, TuningSettings
from jobs.evolution.settings import EvolutionSettings, RandomBaselineSettings
from jobs.recipes.ablation import AblationSettings
from jobs.recipes.derived import robust_training_of, targets_of
from jobs.recipes.miniature_ablation import FEW_STEPS, miniature_ablation
from jobs.recipes.recipe import CaptionsSettings, Recipe, SourceSettings
from jobs.recipes.stages import distribution_matching, halving, paper_schedules
from jobs.recipes.teacher import read_teacher
from jobs.training.settings import (
    DistillSettings,
    EfficientSettings,
    RobustSettings,
    TrainerSettings,
    VpredSettings,
)
from jobs.training.sources import EFFICIENT_MODEL
from pipelines.datasets.settings import LatentsSettings, PairsSettings, ReferencesSettings, SamplesSettings
from pipelines.ray_data.settings import Pool
from pipelines.stages.settings import Encoding, Generation, ImageSettings, Sampler, SamplingSettings
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.mini.training.settings import CaptionNoiseSettings
from snapfusion.models.bundled import BUNDLED
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings

_DRAWS = 5
_SCORING: dict[str, Any] = {
    "prompts": PromptSettings(name="test", split="test", draws=_DRAWS),
    # 84 real images of each of the 240 captions.
    "references": ReferencesSettings(name="test", split="test", count=20_160),
}
_TUNING = TuningSettings(
    prompts=PromptSettings(name="validation", split="validation", draws=_DRAWS),
    references=ReferencesSettings(name="validation", split="validation", count=10_080),
)
_SMALL_POOL = Pool(actors=2, cpus=0.5)


@dataclass(frozen=True, kw_only=True)
class _OfModel:
    """Settings of `mini` that follow from its model.

    Attributes:
        v_model: source of the model that predicts v.
        cfg_range: the useful range of w.
        narrow_range: a part of it, with which Fig. 6(d) compares.
        sweep: guidance scales of the ablations' curves.
        few_guidances: of the curves of students with both decoders.
        generation: of the images that teach the decoder.
        evolution_guidance: w of the architecture search.
        mobile: of the bundle: guidance, captions and licence.
        oracle_floor: as in `Recipe`.
    """

    v_model: str
    cfg_range: CfgRange
    narrow_range: CfgRange
    sweep: tuple[float, ...]
    few_guidances: tuple[float, ...]
    generation: Generation
    evolution_guidance: float
    mobile: MobileSettings
    oracle_floor: float | None


_OF_MINIATURE = _OfModel(
    v_model="mini-v",
    # Narrower than SD-v1.5's.
    cfg_range=CfgRange(low=1.0, high=6.0),
    narrow_range=CfgRange(low=1.0, high=4.0),
    sweep=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    few_guidances=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    generation=Generation(steps=50, guidance_range=CfgRange(low=1.0, high=6.0), batch_size=32),
    evolution_guidance=3.0,
    mobile=MobileSettings(
        onnx=("float32", "float16", "int8"),
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
    # Measured 0.99 on the 512 images of the demo, w from [1, 6] (metrics.json, "oracle").
    oracle_floor=0.95,
)


def _of_model(model: str) -> _OfModel:
    """What follows from a model; of one that is not bundled, nothing of the miniature's."""
    if model in BUNDLED:
        return _OF_MINIATURE
    return _OfModel(
        v_model=read_teacher(model).v_model,
        # As in the recipe `sd15`; the paper does not state Fig. 6(d)'s other range.
        cfg_range=CfgRange(low=2.0, high=14.0),
        narrow_range=CfgRange(low=2.0, high=8.0),
        sweep=tuple(1.0 + 0.5 * step for step in range(19)),
        few_guidances=(1.0, 2.0, 4.0, 7.5, 10.0),
        generation=Generation(steps=50, guidance=7.5, batch_size=32),
        evolution_guidance=7.5,
        mobile=MobileSettings(guidance=7.5),
        oracle_floor=None,
    )


def mini(model: str = "mini") -> Recipe:
    """Every stage on the bundled miniature, on two cores in minutes."""
    own = _of_model(model)
    steps = StepDistillationSettings(student_steps=FEW_STEPS, cfg_probability=0.5, cfg_range=own.cfg_range)
    return Recipe(
        name="mini",
        model=model,
        source=SourceSettings(split="training"),
        latents=LatentsSettings(
            images=ImageSettings(min_side=16), encoding=Encoding(batch_size=32), rows_per_unit=64
        ),
        pairs=PairsSettings(
            generation=own.generation,
            rows_per_unit=32,
            teachers=_SMALL_POOL,
            writers=Pool(cpus=0.25),
        ),
        targets=targets_of(steps, draws=10, teachers=_SMALL_POOL),
        robust=RobustSettings(begin=own.v_model, training=robust_training_of(_velocity(1_500))),
        efficient=EfficientSettings(begin=own.v_model, training=_velocity(300, num_workers=2)),
        evolution=EvolutionSettings(
            guidance=own.evolution_guidance,
            sampler=Sampler(steps=8),
            samples=SamplesSettings(
                drawing=SamplingSettings(batch_size=100, images=True), models=_SMALL_POOL
            ),
            training=robust_training_of(_velocity(200)),
        ),
        random_baseline=RandomBaselineSettings(
            training=_velocity(400), evaluation=EvaluationSettings(guidance=(2.0, 4.0), **_SCORING)
        ),
        distill=DistillSettings(
            name="student",
            teacher=own.v_model,
            student=EFFICIENT_MODEL,
            steps=steps,
            loop=_distillation_loop(200, learning_rate=3e-4),
            trainer=TrainerSettings(num_workers=2, micro_batch=16, curve_every=5),
        ),
        schedule="halving",
        schedules={
            "halving": halving("student", 8, 4, model=own.v_model),
            **paper_schedules(own.v_model, small=EFFICIENT_MODEL),
            **distribution_matching(teacher=own.v_model, student=own.v_model, loop=_matching_loop()),
        },
        mobile=own.mobile.model_copy(update={"model": "run:student/model", "decoder": "run:decoder"}),
        evaluation=EvaluationSettings(guidance=own.sweep, **_SCORING),
        ablation=AblationSettings(model=own.v_model),
        oracle_floor=own.oracle_floor,
    )


def _velocity(num_steps: int, *, num_workers: int = 1) -> VpredSettings:
    """Further training of a miniature. Eq. 6."""
    loop = LoopSettings(
        num_steps=num_steps, global_batch=64, learning_rate=5e-4, warmup_steps=50, ema_decay=0.99
    )
    trainer = TrainerSettings(num_workers=num_workers, micro_batch=64 // num_workers)
    return VpredSettings(loop=loop, trainer=trainer)


def _matching_loop() -> LoopSettings:
    """Of DMD2: 200 updates of the generator, with ten of the fake score before each. Not tuned."""
    loop = _distillation_loop(2_200, learning_rate=1e-4)
    return loop.model_copy(update={"decay": "constant", "clip_norm": 10.0, "ema_decay": 0.95})


def _distillation_loop(num_steps: int, *, learning_rate: float) -> LoopSettings:
    return LoopSettings(
        num_steps=num_steps, global_batch=32, learning_rate=learning_rate, warmup_steps=20, ema_decay=0.98
    )


def ablation(model: str = "mini") -> Recipe:
    """The ablations of Fig. 6 and 7 on the miniature: hours of two cores, which can be interrupted."""
    base, own = mini(model), _of_model(model)
    distill = {
        "student": None,
        "loop": _distillation_loop(300, learning_rate=1e-4),
        "trainer": TrainerSettings(micro_batch=32),
    }
    return base.model_copy(
        update={
            "name": "ablation",
            "source": SourceSettings(
                scenes=4_096,
                scenes_per_shard=512,
                seed=7,
                split="training",
                # As those of the miniature's own training: L_ori on right captions alone would teach it to do
                # without guidance.
                caption_noise=CaptionNoiseSettings(),
            ),
            "latents": base.latents.model_copy(update={"rows_per_unit": 128}),
            "distill": base.distill.model_copy(update=distill),
            "evaluation": EvaluationSettings(guidance=own.sweep, tuning=_TUNING, **_SCORING),
            "ablation": miniature_ablation(
                own.v_model, cfg_range=own.cfg_range, narrow_range=own.narrow_range
            ),
        }
    )


def mini_efficient(model: str = "mini") -> Recipe:
    """The miniature with Table 3's UNet: students of fewer steps (Fig. 4), with both decoders (Fig. 8)."""

    def contender(name: str, *, steps: int, folder: str = "", decoder: str | None = None) -> Contender:
        return Contender(
            name=name, model=f"run:{folder or name}/model", sampler=Sampler(steps=steps), decoder=decoder
        )

    base = ablation(model)
    return base.model_copy(
        update={
            "name": "mini-efficient",
            "source": base.source.model_copy(update={"caption_noise": SourceSettings().caption_noise}),
            "efficient": base.efficient.model_copy(update={"training": _velocity(1_500)}),
            "captions": CaptionsSettings(limit=512),
            "schedule": "staged",
            "evaluation": EvaluationSettings(
                contenders=(
                    contender("twin-8", steps=8, folder="efficient"),
                    contender("twin-16", steps=16, folder="efficient"),
                    *(contender(f"{name}-8", steps=8) for name in ("vanilla", "self", "plain", "staged")),
                    contender("staged-8-half", steps=8, folder="staged-8", decoder="run:decoder"),
                ),
                baseline="twin-8",
                also_against=("staged-8",),
                guidance=_of_model(model).few_guidances,
                **_SCORING,
            ),
        }
    )
