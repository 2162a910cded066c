"""Consistency students under Ray Train, LCM and PCM: what is trained, recorded and refused."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from jobs.training.spec import TrainingError
from jobs.training.student import EVALUATION_STEP
from snapfusion.models.bundle import Bundle
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.sampling import consistency_grid, time_grid
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.distillation_batch import TargetSource
from snapfusion.training.lcm import LcmObjective
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.settings import LcmSettings, PcmSettings

ConsistencyObjective = LcmObjective | PcmObjective


def consistency_objective(
    settings: LcmSettings | PcmSettings, *, targets: TargetSource, schedule: Schedule
) -> ConsistencyObjective:
    """The objective of a method."""
    if isinstance(settings, LcmSettings):
        return LcmObjective(settings, targets=targets, schedule=schedule)
    return PcmObjective(settings, targets=targets, schedule=schedule)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, *, objective: ConsistencyObjective, batches: Iterator[Batch], device: torch.device
) -> dict[str, float]:
    """Mean loss on held-out rows, with the UNet's own weights in place of their average."""
    unet.eval()
    losses = list[torch.Tensor]()
    for held_out in batches:
        batch = held_out.to(device)
        if isinstance(objective, LcmObjective):
            networks = Networks(trained={MODEL: unet}, bare={MODEL: unet}, averages={MODEL: unet})
            losses.append(objective(networks, batch, step=EVALUATION_STEP))
        else:
            losses.append(objective(unet, batch, step=EVALUATION_STEP))
    return {"loss": float(torch.cat(losses).mean())}


def consistency_record(settings: LcmSettings | PcmSettings, *, schedule: Schedule) -> dict[str, Any]:
    """What the student's folder records of how it was distilled, and so how it is sampled."""
    shared = {"method": settings.method, "teacher_steps": settings.points, "points": settings.points}
    if isinstance(settings, LcmSettings):
        grid = consistency_grid(settings.steps, points=settings.points, schedule_steps=schedule.num_steps)
        record = shared | {
            "steps": settings.steps,
            "timesteps": list(grid[:-1]),
            "sampler": "consistency",
            "cfg_probability": 1.0,
            "w_conditioned": settings.w_conditioned,
        }
        guidance = {"cfg_range": settings.cfg_range.to_values()}
        return record | (guidance if settings.w_conditioned else _taught_guidance(settings))
    record = shared | {
        "steps": settings.phases,
        "timesteps": list(time_grid(settings.phases, schedule_steps=schedule.num_steps)[:-1]),
        "cfg_probability": float(settings.guided),
        "w_conditioned": False,
    }
    return record | (_taught_guidance(settings) if settings.guided else {})


def _taught_guidance(settings: LcmSettings | PcmSettings) -> dict[str, Any]:
    """The record of a student that gives guided images without guidance of its own."""
    return {"cfg_range": {"low": 1.0, "high": 1.0}, "teacher_guidance": settings.cfg_range.to_values()}


def check_consistency(settings: LcmSettings | PcmSettings, *, student: Bundle) -> None:
    """Refuse a student that does not go with the settings.

    Raises:
        TrainingError: naming what does not.
    """
    if settings.points > student.schedule.num_steps:
        raise TrainingError(
            f"consistency.points {settings.points} is more than the schedule's {student.schedule.num_steps} "
            "steps: lower it"
        )
    if not settings.targets.w_conditioned and has_guidance_embedding(student.unet):
        raise TrainingError(
            f"the student {student.source} is w-conditioned, and that of method {settings.method} takes no "
            "guidance: name another one, or set consistency.method=lcm"
        )
