"""Times steps of the training loop in this process, on batches of noise."""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.training.batch import Batch
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.loop import Objective, StepResult, new_state, train
from snapfusion.training.settings import LoopSettings

SECONDS = 2.0
"""Least time for which steps are repeated."""
MIN_REPEATS = 3


def median_seconds(
    run: Callable[[], object], *, least: float = 0.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of a call after a first one, which initializes libraries; all take `least` at least."""
    run()
    times = list[float]()
    while len(times) < MIN_REPEATS or sum(times) < least:
        began = clock()
        run()
        times.append(clock() - began)
    return statistics.median(times)


def noise_batch(bundle: Bundle, rows: int, **columns: Tensor) -> Batch:
    """A batch of so many latents of noise, with other columns."""
    ids = tuple(f"probe/{row}" for row in range(rows))
    return Batch(ids=ids, columns={"latent": torch.randn(rows, *bundle.latent_shape), **columns})


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

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(model, step=1)

    # The first step initializes libraries.
    return statistics.median(step.seconds for step in steps[1:]), median_seconds(update)


def decoder_step(bundle: Bundle, *, loop: LoopSettings, rows: int) -> float:
    """Seconds of a step of the half-width decoder's training by one worker with `rows` of a batch."""
    images = torch.randint(0, 255, (rows, 3, bundle.image_size, bundle.image_size), dtype=torch.uint8)
    return step_seconds(
        HalfDecoder.from_vae(bundle.vae),
        objective=DecoderObjective(stored_images),
        batch=noise_batch(bundle, rows, image=images),
        loop=loop,
    )[0]
