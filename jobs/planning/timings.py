"""Times calls, training steps on noise, and small jobs of the miniature through Ray."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.planning.rates_and_prices import Contention, StartupSeconds
from jobs.training.decoder import distill_decoder
from jobs.training.progress_channel import seconds_per_step
from jobs.training.settings import DecoderSettings, TrainerSettings
from pipelines.datasets.pairs import generate_pairs, pending_units
from pipelines.datasets.settings import PairsSettings
from pipelines.ray_data.settings import Pool
from pipelines.sources.captions import Caption
from pipelines.stages.generate import GeneratePairs
from pipelines.stages.settings import Generation
from pipelines.tables.table import open_table
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.loop import Objective, StepResult, new_state, train
from snapfusion.training.settings import LoopSettings

SECONDS = 2.0
"""Least time for which steps are repeated."""
MIN_REPEATS = 3
_MODEL, _SOURCE = "mini", "probe"
_ROWS = 32
_UNITS = 6
"""Per worker; the miniature generates one in half a second."""
_STEP_ROWS = 8
_STEPS, _FEW_STEPS = 200, 2
_LOOP = LoopSettings(num_steps=_FEW_STEPS, global_batch=_STEP_ROWS, learning_rate=1e-4, ema_decay=0.9)


def seconds_of(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call."""
    began = clock()
    run()
    return clock() - began


def median_seconds(
    run: Callable[[], object], *, least: float = 0.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of a call after a first one, which initializes libraries; all take `least` at least."""
    run()
    times = list[float]()
    while len(times) < MIN_REPEATS or sum(times) < least:
        times.append(seconds_of(run, clock=clock))
    return statistics.median(times)


def noise_batch(bundle: Bundle, rows: int, **columns: Tensor) -> Batch:
    """A batch of so many latents of noise, with other columns."""
    ids = tuple(f"probe/{row}" for row in range(rows))
    return Batch(ids=ids, columns={"latent": torch.randn(rows, *bundle.latent_shape), **columns})


def step_seconds(
    model: nn.Module, *, objective: Objective, batch: Batch, loop: LoopSettings
) -> tuple[float, float]:
    """Median seconds of a training step, and of the update of weights and average within it."""
    steps, rows = list[StepResult](), len(batch)
    # A rate this small keeps the weights, and so the loss, finite on noise.
    changes = {"global_batch": rows, "num_steps": 1_000, "max_loss": None, "learning_rate": 1e-9}
    settings = loop.model_copy(update=changes)
    state = new_state(model, settings=settings)
    began = time.perf_counter()

    def stop(step: StepResult) -> None:
        steps.append(step)
        if len(steps) > MIN_REPEATS and time.perf_counter() - began > SECONDS:
            state.step = settings.num_steps

    batches = itertools.repeat(batch)
    train(state, objective=objective, batches=batches, settings=settings, micro_batch=rows, after_step=stop)

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
    decoder, batch = HalfDecoder.from_vae(bundle.vae), noise_batch(bundle, rows, image=images)
    return step_seconds(decoder, objective=DecoderObjective(stored_images), batch=batch, loop=loop)[0]


def measure_overhead(*, url: str, workers: int, ray_seconds: float) -> tuple[StartupSeconds, Contention]:
    """Measure fixed time around a job's work, and contention of workers on all cores, on the miniature.

    A few PAIRS are generated in an empty folder and a decoder is trained on them, on the connected Ray, which
    took `ray_seconds` to start, by `workers` that fill all cores, or by one if a run never does.
    """
    job, tables = _data_job(f"{url}/pairs", workers=workers)
    training, trainings = _training(f"{url}/decoder", pairs_url=f"{url}/pairs", workers=workers)
    starts = StartupSeconds(ray=ray_seconds, job=job, training=training)
    if workers == 1:
        return starts, Contention()
    return starts, Contention(tables=max(1.0, tables), trainings=max(1.0, trainings))


def _data_job(url: str, *, workers: int) -> tuple[float, float]:
    """Seconds around the work of a data job, and a unit's slowdown against one worker alone."""
    settings = PairsSettings(
        generation=Generation(steps=6, guidance=2.5, batch_size=_ROWS),
        rows_per_unit=_ROWS,
        teachers=Pool(actors=workers),
        writers=Pool(cpus=0.25),
    )
    text, count = "a picture of something", _ROWS * _UNITS * workers
    captions = [Caption(id=f"{row:09d}", ordinal=row, text=text) for row in range(count)]
    stage = GeneratePairs(model=_MODEL, settings=settings.generation, device=settings.device)
    units = itertools.islice(pending_units(settings, (), captions=captions, source=_SOURCE), _UNITS)
    alone = statistics.median(stage(unit).seconds for unit in units)
    seconds = seconds_of(
        lambda: generate_pairs(settings, teacher=_MODEL, captions=captions, source=_SOURCE, url=url)
    )
    work = [record.seconds or 0.0 for record in open_table(url).unit_records()]
    return seconds - sum(work) / workers, statistics.median(work) / alone


def _training(url: str, *, pairs_url: str, workers: int) -> tuple[float, float]:
    """Seconds around the steps of a training, and a step's slowdown against one worker alone."""
    alone = decoder_step(load(_MODEL), loop=_LOOP, rows=_STEP_ROWS)
    steps = _STEPS if workers > 1 else _FEW_STEPS
    settings = DecoderSettings(
        loop=_LOOP.model_copy(update={"num_steps": steps, "global_batch": _STEP_ROWS * workers}),
        compare_random_init=False,
        timing_batches=(1,),
        timing_repeats=1,
        trainer=TrainerSettings(num_workers=workers, micro_batch=_STEP_ROWS),
    )
    reports = list[Mapping[str, Any]]()
    training = partial(distill_decoder, settings, pairs_url=pairs_url, out_url=url, teacher=_MODEL)
    seconds = seconds_of(partial(training, on_report=reports.append))
    step = seconds_per_step(reports)
    return seconds - steps * step, step / alone
