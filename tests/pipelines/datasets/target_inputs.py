"""Settings that tests of TARGETS share, and a teacher that dies."""

import os
import signal
from pathlib import Path
from typing import Any

from pipelines.datasets.settings import TargetsSettings
from pipelines.stages.settings import TeacherSettings
from pipelines.stages.target import ComputeTargets
from pipelines.tables.units import FinishedRows, LatentRows
from snapfusion.models.load import load
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.settings import CfgRange, TargetSettings

SETTINGS = TargetsSettings(
    teaching=TeacherSettings(
        student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), caption_dropout=0.3, batch_size=3, seed=7
    ),
    draws=2,
    cfg_probability=0.5,
)
"""Each unit of LATENTS once vanilla and once guided."""


def online_targets(teacher: str, settings: TargetSettings) -> OnlineTargets:
    """The targets that a training computes, of the draws of `SETTINGS`."""
    bundle = load(teacher)
    seed = SETTINGS.teaching.seed
    return OnlineTargets(bundle, captions=CaptionEncoder(bundle), settings=settings, seed=seed)


class DyingTeacher(ComputeTargets):
    """`ComputeTargets`, but the first guided unit kills its process, which leaves a mark."""

    def __init__(self, *, mark: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mark = Path(mark)

    def __call__(self, rows: LatentRows) -> FinishedRows:
        if rows.guided and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)
