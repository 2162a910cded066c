"""The settings of the tiny students: each with a checkpoint, and a look, in the middle."""

from __future__ import annotations

from jobs.evaluation.settings import PromptSettings
from jobs.training.settings import DistillSettings, TrainerSettings, ValidationSettings, VpredSettings
from pipelines.loading.settings import LoaderSettings
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings

LOOP = LoopSettings(num_steps=4, global_batch=6, learning_rate=1e-3, ema_decay=0.9)
LOADER = LoaderSettings(held_out=0.3)
TRAINER = TrainerSettings(
    num_workers=2, cpus_per_worker=0.5, micro_batch=2, checkpoint_every=2, curve_every=1
)
VALIDATION = ValidationSettings(every=2, prompts=PromptSettings(limit=6), guidance=(2.0, 1.0), pictures=3)
VPRED = VpredSettings(
    loop=LOOP, loader=LOADER, trainer=TRAINER.model_copy(update={"num_workers": 1}), validation=VALIDATION
)
DISTILL = DistillSettings(
    steps=StepDistillationSettings(
        student_steps=4, cfg_probability=0.5, cfg_range=CfgRange(low=1.0, high=6.0)
    ),
    loop=LOOP,
    loader=LOADER,
    trainer=TRAINER,
    validation=VALIDATION,
)
