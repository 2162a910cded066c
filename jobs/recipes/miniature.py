"""Recipes of the bundled miniature."""

from __future__ import annotations

from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings
from jobs.evolution.settings import EvolutionSettings, RandomBaselineSettings
from jobs.recipes.ablation import AblationSettings, Line, Panel, StudentVariant
from jobs.recipes.recipe import CaptionsSettings, Recipe, SourceSettings
from jobs.recipes.stages import DistillationStage, paper_schedules
from jobs.training.settings import (
    DistillSettings,
    EfficientSettings,
    RobustSettings,
    RobustTrainingSettings,
    TrainerSettings,
    VpredSettings,
)
from jobs.training.sources import EFFICIENT_MODEL
from pipelines.datasets.settings import (
    LatentsSettings,
    PairsSettings,
    ReferencesSettings,
    SamplesSettings,
    TargetsSettings,
)
from pipelines.ray_data.settings import Pool
from pipelines.stages.settings import (
    Encoding,
    Generation,
    ImageSettings,
    Sampler,
    SamplingSettings,
    TeacherSettings,
)
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.training.settings import CfgRange, LoopSettings, SkipSettings, StepDistillationSettings

_FEW_STEPS, _MANY_STEPS = 4, 50
_WIDE = CfgRange(low=1.0, high=6.0)
_NARROW = CfgRange(low=1.0, high=4.0)
_PROMPTS, _REFERENCES = PromptSettings(limit=500), ReferencesSettings(count=4_000)


def miniature_ablation() -> AblationSettings:
    """Fig. 6(a-d) and 7(a-c) for the miniature, whose useful range of w is [1, 6] instead of [2, 14]."""
    return AblationSettings(
        variants=(
            StudentVariant(name="control"),
            _variant("vanilla", p=0.0),
            _variant("mixed"),
            _variant("cfg", p=1.0),
            _variant("vanilla-8", p=0.0, student_steps=8),
            _variant("mixed-8", student_steps=8),
            _variant("cfg-8", p=1.0, student_steps=8),
            _variant("p0.1-w1to4", p=0.1, cfg_range=_NARROW),
            _variant("p0.1-w1to6", p=0.1),
            _variant("p0.3-w1to4", cfg_range=_NARROW),
            _variant("p0.5-w1to6", p=0.5),
            _variant("gamma0.01", gamma=0.01),
            _variant("gamma1", gamma=1.0),
            _variant("constant0", gamma=0.0, constant=True),
            _variant("constant1", gamma=1.0, constant=True),
            _variant("vanilla-from-16", p=0.0, k=4),
            _variant("vanilla-from-32", p=0.0, k=8),
            _variant("vanilla-from-64", p=0.0, k=16),
            _variant("progressive-16", p=0.0, student_steps=16),
            _variant("progressive-8", p=0.0, student_steps=8, after="progressive-16"),
            _variant("progressive-4", p=0.0, after="progressive-8"),
            _variant("w-cond-16", p=1.0, student_steps=16, w_conditioned=True),
            _variant("w-cond-8", p=1.0, student_steps=8, w_conditioned=True, after="w-cond-16"),
            _variant("w-cond-4", p=1.0, w_conditioned=True, after="w-cond-8"),
        ),
        panels=(
            _panel(
                "6c",
                "Vanilla, CFG-aware and mixed: 4 steps from 8",
                Line(name="teacher-8", steps=8),
                *(_line(name) for name in ("vanilla", "mixed", "cfg", "control")),
                control="control",
                seeds=3,
            ),
            Panel(
                name="8-steps",
                title="Vanilla, CFG-aware and mixed: 8 steps from 16",
                lines=(
                    Line(name="teacher-50", steps=_MANY_STEPS),
                    Line(name="undistilled-8", steps=8),
                    Line(name="teacher-16", steps=16),
                    *(_line(name, steps=8) for name in ("vanilla-8", "mixed-8", "cfg-8")),
                    _line("control-8", of="control", steps=8),
                ),
                baseline="undistilled-8",
                control="control-8",
            ),
            _panel(
                "7b",
                "Weight of the original loss",
                _line("gamma0.01"),
                _line("gamma0.2", of="mixed"),
                *(_line(name) for name in ("gamma1", "constant0", "constant1")),
                seeds=3,
            ),
            _panel(
                "7a",
                "With and without the original loss",
                _line("with-original", of="mixed"),
                _line("without-original", of="constant0"),
            ),
            _panel(
                "6d",
                "CFG probability and range",
                _line("p0", of="vanilla"),
                *(_line(name) for name in ("p0.1-w1to4", "p0.1-w1to6", "p0.3-w1to4")),
                _line("p0.3-w1to6", of="mixed"),
                _line("p0.5-w1to6"),
                _line("p1-w1to6", of="cfg"),
                seeds=3,
            ),
            _panel(
                "7c",
                "Steps of the teacher, vanilla loss",
                _line("from-8", of="vanilla"),
                *(_line(f"from-{steps}", of=f"vanilla-from-{steps}") for steps in (16, 32, 64)),
            ),
            _panel(
                "6a",
                "Direct and progressive, vanilla loss",
                _line("direct", of="vanilla"),
                _line("progressive", of="progressive-4"),
            ),
            _panel(
                "6b",
                "w-conditioned and guided",
                _line("w-cond-16", steps=16),
                _line("w-cond-8", steps=8),
                *(_line(name) for name in ("w-cond-4", "mixed")),
            ),
        ),
    )


def _variant(
    name: str,
    *,
    p: float = 0.3,
    cfg_range: CfgRange = _WIDE,
    gamma: float = 0.2,
    constant: bool = False,
    student_steps: int = _FEW_STEPS,
    k: int = 2,
    w_conditioned: bool = False,
    after: str | None = None,
) -> StudentVariant:
    return StudentVariant(
        name=name,
        after=after,
        steps=StepDistillationSettings(
            student_steps=student_steps,
            k=k,
            cfg_probability=p,
            cfg_range=cfg_range,
            gamma=gamma,
            gamma_rule="constant" if constant else "dynamic",
            w_conditioned=w_conditioned,
        ),
    )


def _line(name: str, *, of: str | None = None, steps: int = _FEW_STEPS) -> Line:
    """A line of the student `of`, or of the one with the line's name."""
    return Line(name=name, variant=of or name, steps=steps)


def _panel(name: str, title: str, *lines: Line, control: str | None = None, seeds: int = 1) -> Panel:
    """A panel of students beside the undistilled model with many and few steps."""
    undistilled = Line(name="teacher-50", steps=_MANY_STEPS), Line(name="undistilled-4", steps=_FEW_STEPS)
    return Panel(
        name=name,
        title=title,
        lines=(*undistilled, *lines),
        baseline="undistilled-4",
        control=control,
        seeds=seeds,
    )


def mini() -> Recipe:
    """Every stage on the bundled miniature, on two cores in minutes."""
    return Recipe(
        name="mini",
        model="mini",
        source=SourceSettings(),
        latents=LatentsSettings(
            images=ImageSettings(min_side=16),
            encoding=Encoding(batch_size=32),
            rows_per_unit=64,
        ),
        pairs=PairsSettings(
            generation=Generation(steps=50, guidance=2.5, batch_size=32),
            rows_per_unit=32,
            teachers=Pool(actors=2, cpus=0.5),
            writers=Pool(cpus=0.25),
        ),
        targets=TargetsSettings(
            # The miniature's useful range of w is narrower than SD-v1.5's.
            teaching=TeacherSettings(student_steps=4, k=2, cfg_range=_WIDE, batch_size=32),
            draws=10,
            cfg_probability=0.5,
            teachers=Pool(actors=2, cpus=0.5),
        ),
        # With 0.2, removing a group of blocks costs a third of what it costs without robust training
        # (docs/efficient_unet.md).
        robust=RobustSettings(
            begin="mini-v",
            training=_robust(1_500),
        ),
        efficient=EfficientSettings(
            begin="mini-v",
            training=_velocity(300),
        ),
        evolution=EvolutionSettings(
            guidance=3.0,
            sampler=Sampler(steps=8),
            samples=SamplesSettings(
                drawing=SamplingSettings(batch_size=100, images=True), models=Pool(actors=2, cpus=0.5)
            ),
            training=_robust(200),
        ),
        random_baseline=RandomBaselineSettings(
            training=_velocity(400),
            evaluation=EvaluationSettings(
                guidance=(2.0, 4.0),
                prompts=_PROMPTS,
                references=_REFERENCES,
            ),
        ),
        # With 8 steps the miniature is hardly worse than with 50; with 4 there is something to distil.
        distill=DistillSettings(
            name="student",
            teacher="mini-v",
            student=EFFICIENT_MODEL,
            steps=StepDistillationSettings(student_steps=4, k=2, cfg_probability=0.5, cfg_range=_WIDE),
            loop=LoopSettings(
                num_steps=200, global_batch=32, learning_rate=3e-4, warmup_steps=20, ema_decay=0.98
            ),
            trainer=TrainerSettings(micro_batch=32, curve_every=5),
        ),
        # From the bundled v-prediction model, whose 8 steps are hardly worse than 50.
        schedule="halving",
        schedules={
            "halving": (
                DistillationStage(name="student-8", teacher="mini-v", student="mini-v", student_steps=8),
                DistillationStage(
                    name="student-4",
                    teacher="run:student-8/model",
                    student="run:student-8/model",
                    student_steps=4,
                ),
            ),
            **paper_schedules("mini-v", small=EFFICIENT_MODEL),
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
        # Measured 1.00 on the 512 images of the demo (metrics.json, "oracle").
        oracle_floor=0.95,
    )


def _velocity(num_steps: int) -> VpredSettings:
    return VpredSettings(loop=_loop(num_steps), trainer=TrainerSettings(micro_batch=64))


def _robust(num_steps: int) -> RobustTrainingSettings:
    return RobustTrainingSettings(
        skip=SkipSettings(attention=0.2, resnet=0.2),
        loop=_loop(num_steps),
        trainer=TrainerSettings(micro_batch=64),
    )


def _loop(num_steps: int) -> LoopSettings:
    """Loop settings for further training of a miniature."""
    return LoopSettings(
        num_steps=num_steps, global_batch=64, learning_rate=5e-4, warmup_steps=50, ema_decay=0.99
    )


def ablation() -> Recipe:
    """The ablations of Fig. 6 and 7 on the miniature: hours of two cores, which can be interrupted."""
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
            "source": SourceSettings(scenes=4_096, scenes_per_shard=512, seed=7),
            "latents": latents,
            "distill": distill,
            "evaluation": EvaluationSettings(
                guidance=tuple(1.0 + 0.5 * step for step in range(13)),
                prompts=_PROMPTS,
                references=_REFERENCES,
            ),
            "ablation": miniature_ablation(),
        }
    )


def mini_efficient() -> Recipe:
    """The miniature with Table 3's UNet: students of fewer steps (Fig. 4), with both decoders (Fig. 8)."""
    base = ablation()

    def contender(name: str, *, steps: int, folder: str = "", decoder: str | None = None) -> Contender:
        return Contender(
            name=name, model=f"run:{folder or name}/model", sampler=Sampler(steps=steps), decoder=decoder
        )

    return base.model_copy(
        update={
            "name": "mini-efficient",
            "efficient": EfficientSettings(
                begin="mini-v",
                training=_velocity(1_500),
            ),
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
                guidance=(1.0, 2.0, 3.0, 4.0, 6.0),
                prompts=_PROMPTS,
                references=_REFERENCES,
            ),
        }
    )
