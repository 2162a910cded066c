"""Measurements of this machine, in a minute or two: what a unit of each kind of work takes.

What each is measured by:

render, read, encode, write   two units of LATENTS, by the pipeline's own stages, in this process
pass, decode                  the teacher's stage that makes PAIRS, with 2 and with 6 steps
train, update                 the training loop on Eq. 6, of the model's own UNet and of the efficient one
train_decoder                 the training loop on the half-width decoder
compile                       the export of a UNet, times what a bundle took for each second of that
starts, crowding              a data job and a training of the miniature, through Ray (surroundings.py)

All but its own start is measured while Ray runs, as a run's work is done. On a machine with accelerators
nothing is compiled, and one of them is measured alone.
"""

from __future__ import annotations

import copy
import itertools
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
from torch import nn

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.cli.scenes import render_scenes
from jobs.evaluation.settings import TimingSettings
from jobs.evaluation.timing import setting_of
from jobs.planning.overhead import measure_overhead
from jobs.planning.rates import Rate, Rates, StartupSeconds, WorkKind
from jobs.planning.sizes import ModelSizes, NetworkSize
from jobs.planning.step_probe import LEAST, decoder_step, step_seconds
from jobs.runtime.cluster import connect
from pipelines.datasets.latents import encode_latents
from pipelines.ray_data.execution import PipelineStage, Runner
from pipelines.sources.webdataset import list_shards
from pipelines.stages.generate import GeneratePairs
from pipelines.tables.schemas import to_png
from snapfusion.models.architecture import Architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.unet import build_unet
from snapfusion.noise import noise_key
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.velocity import VelocityObjective

OnPart = Callable[[str], None]
"""Told what is measured next."""

SECONDS = 1.0
"""That a call is repeated for, at least."""
COMPILE_PER_EXPORT = 175.0
"""CPU seconds of the miniature's bundle of four variants for each of its UNet's export (docs/plan.md)."""

_UNITS = 2
_FEW, _MORE = 2, 6
"""Steps of the teacher whose difference is the time of its passes alone."""
_SCENES = 128


@dataclass
class _Found:
    """Rates as they are measured."""

    rates: dict[WorkKind, list[Rate]] = field(default_factory=lambda: defaultdict(list))

    def update(self, network: NetworkSize) -> float:
        """Seconds of an update as a forecast takes them; what else a step takes is in its rows."""
        return self.rates["update"][0].seconds * network.parameters / 1e6

    def add(self, kind: WorkKind, seconds: float, *, gmacs: float | None = None) -> None:
        # A difference of two times may come out as nothing on a busy machine.
        self.rates[kind].append(Rate(seconds=max(seconds, 1e-9), gmacs=gmacs))


def probe(
    job: Job, *, sizes: ModelSizes, efficient: Architecture, on_part: OnPart = lambda part: None
) -> Rates:
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


def _probe(job: Job, *, sizes: ModelSizes, efficient: Architecture, on_part: OnPart) -> Rates:
    found, device = _Found(), _device()
    with tempfile.TemporaryDirectory() as scratch:
        job = replace(job, out=scratch)
        on_part("the start of Ray")
        began = time.monotonic()
        connect(job.recipe.cluster)
        ray_seconds = time.monotonic() - began
        on_part("rows: read, encoded, written")
        _rows(job, sizes=sizes, found=found)
        on_part("the teacher's passes")
        share = _teacher(job, sizes=sizes, found=found)
        on_part("training steps")
        bundle = load(job.recipe.model, device=str(device))
        for architecture in dict.fromkeys((sizes.architecture, efficient)):
            _trained(job, bundle, architecture, sizes=sizes, found=found)
        _decoder_trained(job, bundle, sizes=sizes, found=found)
        on_part("a UNet's export")
        if device.type == "cpu":
            found.add("compile", COMPILE_PER_EXPORT * _export(bundle, sizes=sizes))
        del bundle
        on_part("a data job and a training through Ray")
        around = measure_overhead(place=f"{scratch}/surroundings", workers=_crowd(job))
    setting = setting_of(TimingSettings(device=device.type))  # type: ignore[arg-type] # cpu or cuda
    return Rates(
        name=f"probe of {setting.device}",
        worker=setting.device if device.type == "cuda" else f"one thread of {setting.device}",
        date=datetime.now(UTC).date().isoformat(),
        about=f"measured by recipe {job.recipe.name} on this machine, {os.cpu_count()} cores",
        rates={kind: tuple(rates) for kind, rates in found.rates.items()},
        checkpointed=job.recipe.efficient.training.gradient_checkpointing,
        crowding=around.crowding,
        starts=StartupSeconds(ray=ray_seconds, job=around.job_seconds, training=around.training_seconds),
        png_share=share,
    )


def _crowd(job: Job) -> int:
    """Workers that fill every core of this machine, if the recipe has so many at any time; else one."""
    recipe, cores = job.recipe, os.cpu_count() or 1
    pools = (recipe.latents.encoders, recipe.pairs.teachers, recipe.targets.teachers)
    trainings = (recipe.vpred, recipe.efficient.training, recipe.distill, recipe.decoder)
    most = max(*(pool.actors for pool in pools), *(each.trainer.num_workers for each in trainings))
    return cores if _device().type == "cpu" and most >= cores else 1


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


def _rows(job: Job, *, sizes: ModelSizes, found: _Found) -> None:
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
        url=job.url("latents"),
        run=_timed(times, results=_UNITS),
    )
    if not table.num_rows:
        raise SettingsError(
            f"--set source.url: of the first {_UNITS} units of {shards[0].url} no row is usable; "
            "nothing can be measured by it"
        )
    rows = max(file.rows for file in table.units)
    kinds: dict[str, WorkKind] = {"ReadShard": "read", "EncodeLatents": "encode", "WriteUnit": "write"}
    for stage, kind in kinds.items():
        # The first call sets libraries up.
        gmacs = sizes.encoder.gmacs if kind == "encode" else None
        found.add(kind, min(times[stage]) / rows, gmacs=gmacs)


def _timed(times: dict[str, list[float]], *, results: int) -> Runner:
    """Stages one after the other in this process, timed by the name of their class; the first results."""

    def run(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
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


def _teacher(job: Job, *, sizes: ModelSizes, found: _Found) -> float:
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


def _passes(job: Job) -> int:
    """The difference between a batch of PAIRS with more steps and one with few."""
    generation = job.recipe.pairs.generation
    return (_MORE - _FEW) * (1 if generation.guidance == 1.0 else 2) * generation.batch_size


def _artist(job: Job, *, steps: int, images: bool) -> tuple[Callable[[], object], Callable[[], Any]]:
    """Draws one batch of PAIRS; and the same, giving the pictures."""
    pairs = job.recipe.pairs
    settings = pairs.generation.model_copy(update={"steps": steps, "images": images})
    stage = GeneratePairs(teacher=job.recipe.model, settings=settings, device=pairs.device)
    ids = stage.bundle.tokenize(["a picture of something"] * settings.batch_size)
    keys = [noise_key("probe", row) for row in range(settings.batch_size)]
    return (lambda: stage.draw(ids, keys)), (lambda: stage.draw(ids, keys)[1])


def _median(run: Callable[[], object]) -> float:
    """Seconds of a call, after one that does not count."""
    run()
    times = list[float]()
    while len(times) < LEAST or sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Trainings


def _trained(
    job: Job, bundle: Bundle, architecture: Architecture, *, sizes: ModelSizes, found: _Found
) -> None:
    """Rates of train and update, of a UNet of one architecture."""
    settings = job.recipe.efficient.training
    own = architecture == sizes.architecture
    unet = bundle.unet if own else nn.Module.to(build_unet(architecture), device=bundle.device)
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
        settings.velocity, captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=settings.loop.seed
    )
    step, update = step_seconds(unet, objective=objective, batch=batch, loop=settings.loop)
    network = sizes.of(architecture)
    if own:
        found.add("update", update / (network.parameters / 1e6))
    found.add("train", (step - found.update(network)) / rows, gmacs=network.gmacs)
    unet.requires_grad_(requires_grad=False)


def _decoder_trained(job: Job, bundle: Bundle, *, sizes: ModelSizes, found: _Found) -> None:
    """Rate of train_decoder."""
    settings = job.recipe.decoder
    rows = min(
        max(1, settings.loop.global_batch // settings.trainer.num_workers), settings.trainer.micro_batch
    )
    step = decoder_step(bundle, loop=settings.loop, rows=rows)
    found.add("train_decoder", (step - found.update(sizes.half)) / rows, gmacs=sizes.half.gmacs)


def _export(bundle: Bundle, *, sizes: ModelSizes) -> float:
    """CPU seconds of the export of the model's UNet."""
    unet = copy.deepcopy(bundle.unet).eval()
    c, h, w = bundle.latent_shape
    width = int(unet.config["cross_attention_dim"])
    inputs = (torch.randn(2, c, h, w), torch.full((2,), 999.0), torch.randn(2, sizes.tokens, width))
    times = list[float]()
    with torch.no_grad():
        for _ in range(LEAST):
            began = time.process_time()
            torch.export.export(unet, inputs)
            times.append(time.process_time() - began)
    return statistics.median(times)
