"""The oracle's stage: the attributes of training scenes, told from their pictures."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from snapfusion.mini.oracle import Oracle, attribute_loss, scene_labels
from snapfusion.mini.scenes import image_batch, scene_of
from snapfusion.mini.training.settings import StageSettings
from snapfusion.mini.training.stage import device_of, step_generator, training_indexes


def oracle_loss(oracle: Oracle, *, seed: int, settings: StageSettings) -> Callable[[int], Tensor]:
    """The mean cross-entropy of the five attributes."""

    def loss(step: int) -> Tensor:
        generator = step_generator(seed=seed, stage="oracle", step=step)
        indexes = training_indexes(settings.batch, generator)
        labels = scene_labels([scene_of(index) for index in indexes])
        device = device_of(oracle)
        return attribute_loss(oracle(image_batch(indexes).to(device)), labels.to(device))

    return loss
