"""A minute's measurements of this machine: what a unit of each kind of work takes, by the recipe's stages.

What each is measured by:

render, read, encode, write   two units of LATENTS, by the pipeline's own stages, in this process
pass, decode                  the teacher's stage that makes PAIRS, with 2 and with 6 steps
train, update                 the training loop on Eq. 6, of the model's own UNet and of the efficient one
train_decoder                 the training loop on the half-width decoder, by as many processes as train it
compile                       the export of a UNet, times what a bundle took for each second of that
crowding                      passes on one core, and on all of them at once
starts                        a data job and a training of the miniature, through Ray, on a few rows

On a machine with accelerators nothing is compiled, and one of them is measured alone.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobs.cli import Job
from jobs.encode_latents import shards_url
from jobs.planning.rates import Kind, Rate, Rates
from jobs.planning.sizes import Network, Sizes
from jobs.planning.starts import measure_starts
from jobs.render_scenes import render_scenes
from jobs.timing import TimingSettings, setting_of
from pipelines.execution import Runner, Stage
from pipelines.latents import encode_latents
from pipelines.schemas import to_png
from pipelines.sources.webdataset import list_shards
from pipelines.stages.generate import GeneratePairs
from snapfusion.models.architecture import Architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.models.unet import build
from snapfusion.noise import noise_key
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import Captions
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.loop import LoopSettings, Objective, Step, new_state, train
from snapfusion.training.velocity import VelocityObjective

OnPart = Callable[[str], None]
"""Told what is measured next."""

SECONDS = 2.0
"""That each thing is repeated for, at least."""
COMPILE_PER_EXPORT = 175.0
"""CPU seconds of the miniature's bundle of four variants for each of its UNet's export (docs/plan.md)."""

_UNITS = 2
_FEW, _MORE = 2, 6
"""Steps of the teacher whose difference is the time of its passes alone."""
_LEAST = 3
_SCENES = 128


@dataclass
class _Found:
    """Rates as they are measured."""

    rates: dict[Kind, list[Rate]] = field(default_factory=lambda: defaultdict(list))

    def update(self, network: Network) -> float:
        """Seconds of an update as a forecast takes them; what else a step takes is in its rows."""
        return self.rates["update"][0].seconds * network.parameters / 1e6

    def add(self, kind: Kind, seconds: float, *, gmacs: float | None = None) -> None:
        # A difference of two times may come out as nothing on a busy machine.
        self.rates[kind].append(Rate(seconds=max(seconds, 1e-9), gmacs=gmacs))


def probe(job: Job, *, sizes: Sizes, efficient: Architecture, on_part: OnPart = lambda part: None) -> Rates:
    """Measure this machine for a recipe.

    Args:
        job: the recipe.
        sizes: the model's networks.
        efficient: the architecture that the efficient UNet has.
        on_part: told of the progress.

    Raises:
        SettingsError: if the recipe asks for a device that is not here.
    """
    _check_device(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _probe(job, sizes=sizes, efficient=efficient, on_part=on_part)
    finally:
        torch.set_num_threads(threads)


def _probe(job: Job, *, sizes: Sizes, efficient: Architecture, on_part: OnPart) -> Rates:
    found, device = _Found(), _device()
    with tempfile.TemporaryDirectory() as scratch:
        job = replace(job, out=scratch)
        on_part("rows: read, encoded, written")
        _rows(job, sizes=sizes, found=found)
        on_part("the teacher's passes")
        share = _teacher(job, sizes=sizes, found=found)
        on_part("training steps")
        bundle = load(job.recipe.model, device=str(device))
        for architecture in dict.fromkeys((sizes.architecture, efficient)):
            _trained(job, bundle, architecture, sizes=sizes, found=found)
        on_part("a UNet's export")
        if device.type == "cpu":
            found.add("compile", COMPILE_PER_EXPORT * _export(bundle, sizes=sizes))
        del bundle
        on_part("all cores at once")
        crowding = _together(job, sizes=sizes, found=found)
        on_part("the start of Ray, of a data job and of a training")
        starts = measure_starts(job.recipe.cluster, place=f"{scratch}/starts")
    setting = setting_of(TimingSettings(device=device.type))  # type: ignore[arg-type] # cpu or cuda
    return Rates(
        name=f"probe of {setting.device}",
        worker=setting.device if device.type == "cuda" else f"one thread of {setting.device}",
        date=datetime.now(UTC).date().isoformat(),
        about=f"measured by recipe {job.recipe.name} on this machine, {os.cpu_count()} cores",
        rates={kind: tuple(rates) for kind, rates in found.rates.items()},
        checkpointed=job.recipe.efficient.training.gradient_checkpointing,
        crowding=crowding,
        starts=starts,
        png_share=share,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_device(job: Job) -> None:
    recipe = job.recipe
    wanted = {
        "latents": recipe.latents.device.kind,
        "pairs": recipe.pairs.device.kind,
        "targets": recipe.targets.device.kind,
    }
    for name, kind in wanted.items():
        if kind == "cuda" and not torch.cuda.is_available():
            raise SettingsError(
                f"--set plan.rates: recipe {recipe.name} asks for an accelerator ({name}.device.kind), and "
                "torch finds none here to probe; give rates, or probe on a machine of the cluster"
            )


# Tables


def _rows(job: Job, *, sizes: Sizes, found: _Found) -> None:
    """Two units of LATENTS: rates of render, read, encode and write."""
    recipe = job.recipe
    if recipe.source.url is None:
        unit = recipe.latents.rows_per_unit
        scenes = recipe.source.model_copy(
            update={"scenes": max(_SCENES, _UNITS * unit), "scenes_per_shard": max(_SCENES, _UNITS * unit)}
        )
        job = replace(job, recipe=recipe.model_copy(update={"source": scenes}))
        began = time.perf_counter()
        render_scenes(job)
        found.add("render", (time.perf_counter() - began) / scenes.scenes)
    times: dict[str, list[float]] = defaultdict(list)
    shards = list_shards(shards_url(job))[:1]
    table = encode_latents(
        recipe.latents,
        model=recipe.model,
        shards=shards,
        source="probe",
        url=job.place("latents"),
        run=_timed(times, results=_UNITS),
    )
    if not table.num_rows:
        raise SettingsError(
            f"--set source.url: of the first {_UNITS} units of {shards[0].url} no row is usable; "
            "nothing can be measured by it"
        )
    rows = max(file.rows for file in table.units)
    kinds: dict[str, Kind] = {"ReadShard": "read", "EncodeLatents": "encode", "WriteUnit": "write"}
    for stage, kind in kinds.items():
        # The first call sets libraries up.
        gmacs = sizes.encoder.gmacs if kind == "encode" else None
        found.add(kind, min(times[stage]) / rows, gmacs=gmacs)


def _timed(times: dict[str, list[float]], *, results: int) -> Runner:
    """Stages one after the other in this process, timed by the name of their class; the first results."""

    def run(items: Iterable[Any], stages: list[Stage]) -> Iterator[Any]:
        works = [(stage.build.__name__, stage.build(**stage.arguments)) for stage in stages]
        yield from itertools.islice(_through(items, works, times), results)

    return run


def _through(
    items: Iterable[Any], works: list[tuple[str, Callable[[Any], Any]]], times: dict[str, list[float]]
) -> Iterator[Any]:
    if not works:
        yield from items
        return
    name, work = works[0]
    for item in items:
        yield from _through(_each(name, work, item, times), works[1:], times)


def _each(name: str, work: Callable[[Any], Any], item: Any, times: dict[str, list[float]]) -> Iterator[Any]:  # noqa: ANN401
    began = time.perf_counter()
    result = work(item)
    results = result if isinstance(result, Iterator) else iter([result])
    while True:
        one = next(results, None)
        times[name].append(time.perf_counter() - began)
        if one is None:
            times[name].pop()
            return
        yield one
        began = time.perf_counter()


def _teacher(job: Job, *, sizes: Sizes, found: _Found) -> float:
    """Rates of pass, decode and write_image; returns the share of a picture's bytes that its PNG has."""
    few, _ = _artist(job, steps=_FEW, images=False)
    more, _ = _artist(job, steps=_MORE, images=False)
    drawn, pictures = _artist(job, steps=_FEW, images=True)
    rows = job.recipe.pairs.generation.batch_size
    took = {name: _median(run) for name, run in (("few", few), ("more", more), ("drawn", drawn))}
    found.add("pass", (took["more"] - took["few"]) / _passes(job), gmacs=sizes.unet.gmacs)
    found.add("decode", (took["drawn"] - took["few"]) / rows, gmacs=sizes.decoder.gmacs)
    batch = pictures()
    pngs = [to_png(image) for image in batch]
    found.add("write_image", _median(lambda: [to_png(image) for image in batch]) / rows)
    return sum(map(len, pngs)) / batch.nbytes


def _artist(job: Job, *, steps: int, images: bool) -> tuple[Callable[[], object], Callable[[], Any]]:
    """Draws one batch of PAIRS; and the same, giving the pictures."""
    pairs = job.recipe.pairs
    settings = pairs.generation.model_copy(update={"steps": steps, "images": images})
    stage = GeneratePairs(teacher=job.recipe.model, settings=settings, device=pairs.device)
    ids = stage.bundle.tokenize(["a picture of something"] * settings.batch_size)
    keys = [noise_key("probe", row) for row in range(settings.batch_size)]
    return (lambda: stage.draw(ids, keys)), (lambda: stage.draw(ids, keys)[1])


def _median(run: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call by `clock`, after one call that does not count."""
    run()
    times, began = list[float](), time.perf_counter()
    while len(times) < _LEAST or time.perf_counter() - began < SECONDS / 2:
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


# Trainings


def _trained(job: Job, bundle: Bundle, architecture: Architecture, *, sizes: Sizes, found: _Found) -> None:
    """Rates of train and update, of a UNet of one architecture."""
    settings = job.recipe.efficient.training
    own = architecture == sizes.architecture
    unet = bundle.unet if own else nn.Module.to(build(architecture), device=bundle.device)
    unet.requires_grad_(requires_grad=True)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    rows = min(settings.trainer.micro_batch, settings.loop.global_batch)
    c, h, w = bundle.latent_shape
    batch = Batch(
        ids=tuple(f"probe/{row}" for row in range(rows)),
        columns={
            "latent": torch.randn(rows, c, h, w),
            "token_ids": bundle.tokenize(["a picture of something"] * rows),
        },
    )
    objective = VelocityObjective(
        settings.velocity, captions=Captions(bundle), schedule=bundle.schedule, seed=settings.loop.seed
    )
    step, update = _step_seconds(unet, objective=objective, batch=batch, loop=settings.loop)
    network = sizes.of(architecture)
    if own:
        found.add("update", update / (network.parameters / 1e6))
    found.add("train", (step - found.update(network)) / rows, gmacs=network.gmacs)
    unet.requires_grad_(requires_grad=False)


def _step_seconds(
    model: nn.Module,
    *,
    objective: Objective,
    batch: Batch,
    loop: LoopSettings,
    wrapped: nn.Module | None = None,
    rows: int | None = None,
) -> tuple[float, float]:
    """Seconds of a step of the training loop; and of moving weights and average, which are part of it."""
    steps = list[Step]()
    settings = loop.model_copy(
        update={
            "global_batch": rows or len(batch),
            "num_steps": 1_000,
            "max_loss": None,
            "learning_rate": 1e-9,
        }
    )
    state = new_state(model, settings=settings)
    began = time.perf_counter()

    def stop_in_time(step: Step) -> None:
        steps.append(step)
        enough = len(steps) > _LEAST and time.perf_counter() - began > SECONDS
        if _first_says(enough):
            state.step = settings.num_steps

    train(
        state,
        objective=objective,
        batches=itertools.repeat(batch),
        settings=settings,
        micro_batch=len(batch),
        wrapped=wrapped,
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
    for _ in range(_LEAST):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    # The first step sets libraries up.
    return statistics.median(step.seconds for step in steps[1:]), statistics.median(times)


def _first_says(enough: bool) -> bool:
    """What the first of several processes says, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return enough
    said = [enough]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _export(bundle: Bundle, *, sizes: Sizes) -> float:
    """CPU seconds of the export of the model's UNet."""
    unet = copy.deepcopy(bundle.unet).eval()
    c, h, w = bundle.latent_shape
    width = int(unet.config["cross_attention_dim"])
    inputs = (torch.randn(2, c, h, w), torch.full((2,), 999.0), torch.randn(2, sizes.tokens, width))
    times = list[float]()
    with torch.no_grad():
        for _ in range(_LEAST):
            began = time.process_time()
            torch.export.export(unet, inputs)
            times.append(time.process_time() - began)
    return min(times)


# All cores at once


def _together(job: Job, *, sizes: Sizes, found: _Found) -> float:
    """Rate of train_decoder, of one worker as if it were alone; returns how all cores crowd each other."""
    settings = job.recipe.decoder.trainer
    if _device().type == "cuda":
        step, rows = _decoder_step(job, workers=1)
        found.add("train_decoder", (step - found.update(sizes.half)) / rows, gmacs=sizes.half.gmacs)
        return 1.0
    cores = os.cpu_count() or 1
    alone = _pass_cpu_seconds(job)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, context.Pool(cores) as pool:
        told = [
            _Told(job=job, rank=rank, cores=cores, meeting=f"file://{scratch}/meeting")
            for rank in range(cores)
        ]
        measured = pool.map(_on_one_core, told, chunksize=1)
    crowding = max(1.0, statistics.mean(crowded for crowded, _ in measured) / alone)
    steps = [step for _, step in measured if step is not None]
    step, rows = statistics.mean(seconds for seconds, _ in steps), steps[0][1]
    crowded = crowding if 1 < cores <= settings.num_workers else 1.0
    found.add("train_decoder", (step / crowded - found.update(sizes.half)) / rows, gmacs=sizes.half.gmacs)
    return crowding


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What one of several processes is told: as many as there are cores, that meet at a file."""

    job: Job
    rank: int
    cores: int
    meeting: str


def _on_one_core(told: _Told) -> tuple[float, tuple[float, int] | None]:
    """CPU seconds of a pass while all cores compute; and what `_decoder_step` gives, on its workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=told.meeting, rank=told.rank, world_size=told.cores)
    try:
        seconds = _pass_cpu_seconds(told.job)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    workers = min(told.job.recipe.decoder.trainer.num_workers, told.cores)
    if told.rank >= workers:
        return seconds, None
    if workers == 1:
        return seconds, _decoder_step(told.job, workers=1)
    dist.init_process_group(
        "gloo", init_method=f"{told.meeting}-of-trainers", rank=told.rank, world_size=workers
    )
    try:
        return seconds, _decoder_step(told.job, workers=workers)
    finally:
        dist.destroy_process_group()


def _pass_cpu_seconds(job: Job) -> float:
    """CPU seconds of a pass: what a core itself is slowed by, not what else runs beside."""
    few, _ = _artist(job, steps=_FEW, images=False)
    more, _ = _artist(job, steps=_MORE, images=False)
    if dist.is_initialized():
        dist.barrier()
    few_seconds, more_seconds = (_median(run, clock=time.process_time) for run in (few, more))
    return (more_seconds - few_seconds) / _passes(job)


def _passes(job: Job) -> int:
    """The difference between a batch of PAIRS with more steps and one with few."""
    generation = job.recipe.pairs.generation
    return (_MORE - _FEW) * (1 if generation.guidance == 1.0 else 2) * generation.batch_size


def _decoder_step(job: Job, *, workers: int) -> tuple[float, int]:
    """Seconds of a step of the half-width decoder's training, and the rows of it that each worker has."""
    settings, device = job.recipe.decoder, _device()
    bundle = load(job.recipe.model, device=str(device))
    student = HalfDecoder.from_vae(bundle.vae)
    rows = min(max(1, settings.loop.global_batch // workers), settings.trainer.micro_batch)
    c, h, w = bundle.latent_shape
    side = bundle.image_size
    batch = Batch(
        ids=tuple(f"probe/{row}" for row in range(rows)),
        columns={
            "latent": torch.randn(rows, c, h, w),
            "image": torch.randint(0, 255, (rows, 3, side, side), dtype=torch.uint8),
        },
    )
    wrapped = DistributedDataParallel(student, find_unused_parameters=True) if workers > 1 else None
    step, _ = _step_seconds(
        student,
        objective=DecoderObjective(stored_images),
        batch=batch,
        loop=settings.loop,
        wrapped=wrapped,
        rows=rows * workers,
    )
    return step, rows
