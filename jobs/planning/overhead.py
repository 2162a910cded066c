"""Measures fixed time around a job's work, and contention of workers on all cores, on the miniature."""

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

from jobs.planning.rates import Contention, StartupSeconds
from jobs.planning.step_probe import decoder_step
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
from snapfusion.models.load import load
from snapfusion.training.settings import LoopSettings

_MODEL, _SOURCE = "mini", "probe"
_ROWS = 32
_UNITS = 6
"""Per worker; the miniature generates one in half a second."""
_STEP_ROWS = 8
_STEPS, _FEW_STEPS = 200, 2
_LOOP = LoopSettings(num_steps=_FEW_STEPS, global_batch=_STEP_ROWS, learning_rate=1e-4, ema_decay=0.9)


def measure_overhead(*, url: str, workers: int, ray_seconds: float) -> tuple[StartupSeconds, Contention]:
    """Generate a few PAIRS and train a decoder on them, on the connected Ray cluster.

    Args:
        url: an empty folder.
        workers: of the data job and of the training: as many as fill all cores; 1 if a run never does.
        ray_seconds: that the cluster took to start.
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
    captions = [
        Caption(id=f"{row:09d}", ordinal=row, text="a picture of something")
        for row in range(_ROWS * _UNITS * workers)
    ]
    stage = GeneratePairs(model=_MODEL, settings=settings.generation, device=settings.device)
    units = itertools.islice(pending_units(settings, (), captions=captions, source=_SOURCE), _UNITS)
    alone = statistics.median(stage(unit).seconds for unit in units)
    began = time.monotonic()
    generate_pairs(settings, teacher=_MODEL, captions=captions, source=_SOURCE, url=url)
    seconds = time.monotonic() - began
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
    began = time.monotonic()
    distill_decoder(settings, pairs_url=pairs_url, out_url=url, teacher=_MODEL, on_report=reports.append)
    seconds = time.monotonic() - began
    step = seconds_per_step(reports)
    return seconds - steps * step, step / alone
