"""Times steps of the training loop in this process, on batches of noise."""

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
"""Least time for which steps are repeated."""
MIN_REPEATS = 3


def step_seconds(
    model: nn.Module, *, objective: Objective, batch: Batch, loop: LoopSettings
) -> tuple[float, float]:
    """Median seconds of a training step, and of the update of weights and average within it."""
    steps = list[StepResult]()
    # A rate this small keeps the weights, and so the loss, finite on noise.
    settings = loop.model_copy(
        update={"global_batch": len(batch), "num_steps": 1_000, "max_loss": None, "learning_rate": 1e-9}
    )
    state = new_state(model, settings=settings)
    began = time.perf_counter()

    def stop_in_time(step: StepResult) -> None:
        steps.append(step)
        if len(steps) > MIN_REPEATS and time.perf_counter() - began > SECONDS:
            state.step = settings.num_steps

    train(
        state,
        objective=objective,
        batches=itertools.repeat(batch),
        settings=settings,
        micro_batch=len(batch),
        after_step=stop_in_time,
    )
    times = list[float]()
    for _ in range(MIN_REPEATS + 1):
        began = time.perf_counter()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(model, step=1)
        times.append(time.perf_counter() - began)
    # The first of each initializes libraries.
    return statistics.median(step.seconds for step in steps[1:]), statistics.median(times[1:])


def decoder_step(bundle: Bundle, *, loop: LoopSettings, rows: int) -> float:
    """Seconds of a step of the half-width decoder's training by one worker with `rows` of a batch."""
    side = bundle.image_size
    batch = Batch(
        ids=tuple(f"probe/{row}" for row in range(rows)),
        columns={
            "latent": torch.randn(rows, *bundle.latent_shape),
            "image": torch.randint(0, 255, (rows, 3, side, side), dtype=torch.uint8),
        },
    )
    student = HalfDecoder.from_vae(bundle.vae)
    return step_seconds(student, objective=DecoderObjective(stored_images), batch=batch, loop=loop)[0]
