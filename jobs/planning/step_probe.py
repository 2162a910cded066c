"""What a step of the training loop takes, in this process: timed on batches of noise."""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import nn

from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.training.batch import Batch
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.loop import Objective, StepResult, new_state, train
from snapfusion.training.settings import LoopSettings

SECONDS = 2.0
"""That steps are repeated for, at least."""
LEAST = 3
"""Times that anything is measured, at least."""


def step_seconds(
    model: nn.Module, *, objective: Objective, batch: Batch, loop: LoopSettings
) -> tuple[float, float]:
    """Seconds of a step of the training loop; and of moving weights and average, which are part of it."""
    steps = list[StepResult]()
    settings = loop.model_copy(
        update={"global_batch": len(batch), "num_steps": 1_000, "max_loss": None, "learning_rate": 1e-9}
    )
    state = new_state(model, settings=settings)
    began = time.perf_counter()

    def stop_in_time(step: StepResult) -> None:
        steps.append(step)
        if len(steps) > LEAST and time.perf_counter() - began > SECONDS:
            state.step = settings.num_steps

    train(
        state,
        objective=objective,
        batches=itertools.repeat(batch),
        settings=settings,
        micro_batch=len(batch),
        after_step=stop_in_time,
    )

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(model, step=1)

    update()
    times = list[float]()
    for _ in range(LEAST):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    # The first step sets libraries up.
    return statistics.median(step.seconds for step in steps[1:]), statistics.median(times)


def decoder_step(bundle: Bundle, *, loop: LoopSettings, rows: int) -> float:
    """Seconds of a step of the half-width decoder's training by one worker that has `rows` of a batch."""
    c, h, w = bundle.latent_shape
    side = bundle.image_size
    batch = Batch(
        ids=tuple(f"probe/{row}" for row in range(rows)),
        columns={
            "latent": torch.randn(rows, c, h, w),
            "image": torch.randint(0, 255, (rows, 3, side, side), dtype=torch.uint8),
        },
    )
    student = HalfDecoder.from_vae(bundle.vae)
    step, _ = step_seconds(student, objective=DecoderObjective(stored_images), batch=batch, loop=loop)
    return step
