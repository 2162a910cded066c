"""Teachers that only sleep: what is left of the time is what everything round them takes."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.spec import Training
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.generate import GeneratePairs
from pipelines.tables.table import open_table
from snapfusion.training.batch import Batch
from snapfusion.training.settings import LoopSettings

SECONDS_A_ROW = 0.025
SHARE = 8
"""Rows of a training step on each worker."""


class SleepingTeacher(GeneratePairs):
    """Draws nothing: each row takes a fixed time, and is made of what was there before."""

    def generate(self, token_ids: Tensor, keys: list[int]) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """Zeros, and black images."""
        time.sleep(SECONDS_A_ROW * len(keys))
        # Kept in the unit's account: results reach the driver in bursts, between two commits.
        self.environment = {**self.environment, "woke": time.time()}
        side = self.bundle.image_size
        latents = np.zeros((len(keys), *self.bundle.latent_shape), np.float16)
        return latents, [np.zeros((side, side, 3), np.uint8) for _ in keys]


class SleepingObjective:
    """The student's loss is real, of a network that takes no time; the teacher's answer is a sleep."""

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Losses of latents that are to become themselves."""
        latents = batch["latent"].flatten(1)
        time.sleep(SECONDS_A_ROW * len(latents))
        return (model(latents) - latents).square().mean(dim=1)


def student(width: int) -> nn.Module:
    """About a million parameters, for latents of so many numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2_048), nn.ReLU(), nn.Linear(2_048, width))


def trainings(workers: int, steps: int, url: str, device: torch.device) -> Iterator[Training]:
    """As each worker assembles it."""
    settings = LoopSettings(num_steps=steps, global_batch=SHARE * workers, learning_rate=1e-3)
    yield Training(
        name=f"asleep-{workers}",
        model=student(256).to(device),
        objective=SleepingObjective(),
        loader=BatchLoader(
            open_table(url),
            columns=("latent",),
            global_batch=settings.global_batch,
            seed=0,
            settings=LoaderSettings(),
        ),
        settings=settings,
        identity={},
    )
