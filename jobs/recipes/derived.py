"""Settings that follow from those of another part of a recipe, so that each quantity is stated once."""

from typing import Any

from jobs.training.settings import RobustTrainingSettings, VpredSettings
from pipelines.datasets.settings import TargetsSettings
from pipelines.stages.settings import TeacherSettings
from snapfusion.training.settings import SkipSettings, StepDistillationSettings, TargetSettings


def targets_of(steps: StepDistillationSettings, **others: Any) -> TargetsSettings:  # noqa: ANN401 - settings
    """TARGETS that a student of these steps can be trained on; `others` are settings of the table."""
    shared = {name: getattr(steps, name) for name in TargetSettings.model_fields}
    teaching = TeacherSettings(**shared, batch_size=32)
    return TargetsSettings(teaching=teaching, cfg_probability=steps.cfg_probability, **others)


def robust_training_of(vpred: VpredSettings) -> RobustTrainingSettings:
    """The same training with block skipping (Eq. 5), for which the paper gives no probabilities."""
    # With 0.2, removing a group of blocks of the miniature costs a third of what it costs without robust
    # training (docs/efficient_unet.md).
    return RobustTrainingSettings(**dict(vpred) | {"skip": SkipSettings(attention=0.2, resnet=0.2)})
