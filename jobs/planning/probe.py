"""Measures this machine's rates, a unit of each kind of work, in a minute or two.

render, read, encode, write   two units of LATENTS, by the pipeline's own stages, in this process
pass, decode                  the teacher's stage of PAIRS, with 2 and with 6 steps
train, update                 the training loop on Eq. 6, of the model's own UNet and of the efficient one
train_decoder                 the training loop on the half-width decoder
compile                       the export of a UNet, times a measured ratio of a bundle to it
starts, crowding              a data job and a training of the miniature, through Ray (`overhead`)

Everything but Ray's own start is measured while Ray runs, as in a run. On a machine with accelerators
nothing is compiled, and one accelerator is measured alone.
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
from jobs.planning.rates import Rate, Rates, StartupSeconds
from jobs.planning.step_probe import MIN_REPEATS, decoder_step, step_seconds
from jobs.runtime.cluster import connect
from pipelines.costs.stage import WorkKind
from pipelines.datasets.latents import encode_latents
from pipelines.ray_data.execution import PipelineStage, Runner
from pipelines.sources.webdataset import list_shards
from pipelines.stages.generate import GeneratePairs
from pipelines.tables.schemas import to_png
from snapfusion.models.architecture import Architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import Cost
from snapfusion.models.load import load
from snapfusion.models.network_sizes import NetworkSizes
from snapfusion.models.unet import build_unet
from snapfusion.noise import noise_key
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.velocity import VelocityObjective

SECONDS = 1.0
"""Least time for which a call is repeated."""
COMPILE_PER_EXPORT = 175.0
"""CPU seconds of the miniature's bundle of four variants per second of its UNet's export (docs/plan.md)."""

_UNITS = 2
_FEW_STEPS, _MORE_STEPS = 2, 6
"""Steps of the teacher; the difference of both times is that of its passes alone."""
_SCENES = 128
_CAPTION = "a picture of something"


@dataclass
class _Measurements:
    """Rates measured so far."""

    rates: dict[WorkKind, list[Rate]] = field(default_factory=lambda: defaultdict(list))

    def update_seconds(self, network: Cost) -> float:
        """Seconds of an optimizer update as a forecast takes them; the rest of a step is the rows' time."""
        return self.rates["update"][0].seconds * network.parameters / 1e6

    def add(self, kind: WorkKind, seconds: float, *, gmacs: float | None = None) -> None:
        # A difference of two times can be zero or less on a busy machine.
        self.rates[kind].append(Rate(seconds=max(seconds, 1e-9), gmacs=gmacs))


def probe(job: Job, *, sizes: NetworkSizes, efficient: Architecture) -> Rates:
    """Measure this machine for a recipe, and print what is measured next.

    Args:
        job: the recipe.
        sizes: of the model's networks.
        efficient: architecture of the efficient UNet.

    Raises:
        SettingsError: if the recipe needs a device that this machine lacks.
    """
    _check_device(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _probe(replace(job, out=scratch), sizes=sizes, efficient=efficient)
    finally:
        torch.set_num_threads(threads)


def _probe(job: Job, *, sizes: NetworkSizes, efficient: Architecture) -> Rates:
    measured, device = _Measurements(), _device()
    _announce("the start of Ray")
    began = time.monotonic()
    connect(job.recipe.cluster)
    ray_seconds = time.monotonic() - began
    _announce("rows: read, encoded, written")
    _measure_rows(job, sizes=sizes, measured=measured)
    _announce("the teacher's passes")
    png_share = _measure_teacher(job, sizes=sizes, measured=measured)
    _announce("training steps")
    bundle = load(job.recipe.model, device=str(device))
    for architecture in dict.fromkeys((sizes.architecture, efficient)):
        _measure_training(job, bundle, architecture, sizes=sizes, measured=measured)
    _measure_decoder_training(job, bundle, sizes=sizes, measured=measured)
    _announce("a UNet's export")
    if device.type == "cpu":
        measured.add("compile", COMPILE_PER_EXPORT * _export_seconds(bundle, tokens=sizes.tokens))
    del bundle
    _announce("a data job and a training through Ray")
    overhead = measure_overhead(url=job.url("overhead"), workers=_contending_workers(job))
    setting = setting_of(TimingSettings(device=device.type))  # type: ignore[arg-type] # cpu or cuda
    return Rates(
        name=f"probe of {setting.device}",
        worker=setting.device if device.type == "cuda" else f"one thread of {setting.device}",
        date=datetime.now(UTC).date().isoformat(),
        about=f"measured by recipe {job.recipe.name} on this machine, {os.cpu_count()} cores",
        rates={kind: tuple(rates) for kind, rates in measured.rates.items()},
        checkpointed=job.recipe.efficient.training.gradient_checkpointing,
        crowding=overhead.contention,
        starts=StartupSeconds(ray=ray_seconds, job=overhead.job_seconds, training=overhead.training_seconds),
        png_share=png_share,
    )


def _announce(part: str) -> None:
    print(f"  measuring {part}", flush=True)


def _contending_workers(job: Job) -> int:
    """Workers that fill every core of this machine, if the recipe ever has as many; else one."""
    recipe, cores = job.recipe, os.cpu_count() or 1
    pools = (recipe.latents.encoders, recipe.pairs.teachers, recipe.targets.teachers)
    trainings = (recipe.vpred, recipe.efficient.training, recipe.distill, recipe.decoder)
    workers = max(*(pool.actors for pool in pools), *(each.trainer.num_workers for each in trainings))
    return cores if _device().type == "cpu" and workers >= cores else 1


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_device(job: Job) -> None:
    if torch.cuda.is_available():
        return
    for name in ("latents", "pairs", "targets"):
        if getattr(job.recipe, name).device.kind == "cuda":
            raise SettingsError(
                f"--set plan.rates: recipe {job.recipe.name} needs an accelerator ({name}.device.kind), and "
                "torch finds none here to probe; give rates, or probe on a node of the cluster"
            )


# Tables


def _measure_rows(job: Job, *, sizes: NetworkSizes, measured: _Measurements) -> None:
    """Rates of render, read, encode and write, from two units of LATENTS."""
    recipe = job.recipe
    if recipe.source.url is None:
        count = max(_SCENES, _UNITS * recipe.latents.rows_per_unit)
        scenes = recipe.source.model_copy(update={"scenes": count, "scenes_per_shard": count})
        job = replace(job, recipe=recipe.model_copy(update={"source": scenes}))
        began = time.perf_counter()
        render_scenes(job)
        measured.add("render", (time.perf_counter() - began) / count)
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
            f"--set source.url: no row in the first {_UNITS} units of {shards[0].url} is usable, so nothing "
            "can be measured"
        )
    rows = max(file.rows for file in table.units)
    kinds: dict[str, WorkKind] = {"ReadShard": "read", "EncodeLatents": "encode", "WriteUnit": "write"}
    for stage, kind in kinds.items():
        # The first call initializes libraries, so the fastest one counts.
        gmacs = sizes.encoder_gmacs if kind == "encode" else None
        measured.add(kind, min(times[stage]) / rows, gmacs=gmacs)


def _timed(times: dict[str, list[float]], *, results: int) -> Runner:
    """Runs stages in this process up to so many results, and times each by the name of its class."""

    def run(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
        for stage in stages:
            items = _timed_stage(stage.build(**stage.arguments), items, times[stage.build.__name__])
        yield from itertools.islice(items, results)

    return run


def _timed_stage(work: Callable[[Any], Any], items: Iterable[Any], times: list[float]) -> Iterator[Any]:
    for item in items:
        began = time.perf_counter()
        result = work(item)
        for one in result if isinstance(result, Iterator) else (result,):
            times.append(time.perf_counter() - began)
            yield one
            began = time.perf_counter()


def _measure_teacher(job: Job, *, sizes: NetworkSizes, measured: _Measurements) -> float:
    """Rates of pass, decode and write_image; returns a PNG's size as a fraction of its pixels' bytes."""
    generation = job.recipe.pairs.generation
    rows, images = generation.batch_size, _batch_of_pairs(job, steps=_FEW_STEPS, images=True)
    few = _median(_batch_of_pairs(job, steps=_FEW_STEPS, images=False))
    more = _median(_batch_of_pairs(job, steps=_MORE_STEPS, images=False))
    passes = (_MORE_STEPS - _FEW_STEPS) * (1 if generation.guidance == 1.0 else 2) * rows
    measured.add("pass", (more - few) / passes, gmacs=sizes.unet.gmacs)
    measured.add("decode", (_median(images) - few) / rows, gmacs=sizes.decoder_gmacs)
    batch = images()[1]
    measured.add("write_image", _median(lambda: [to_png(image) for image in batch]) / rows)
    return sum(len(to_png(image)) for image in batch) / batch.nbytes


def _batch_of_pairs(job: Job, *, steps: int, images: bool) -> Callable[[], Any]:
    """A call that generates one batch of PAIRS: latents and images."""
    pairs = job.recipe.pairs
    settings = pairs.generation.model_copy(update={"steps": steps, "images": images})
    stage = GeneratePairs(model=job.recipe.model, settings=settings, device=pairs.device)
    ids = stage.bundle.tokenize([_CAPTION] * settings.batch_size)
    keys = [noise_key("probe", row) for row in range(settings.batch_size)]
    return lambda: stage.generate_batch(ids, keys)


def _median(run: Callable[[], object]) -> float:
    """Seconds of a call, after one that warms up."""
    run()
    times = list[float]()
    while len(times) < MIN_REPEATS or sum(times) < SECONDS:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# Trainings


def _measure_training(
    job: Job, bundle: Bundle, architecture: Architecture, *, sizes: NetworkSizes, measured: _Measurements
) -> None:
    """Rates of train and update, of a UNet of one architecture."""
    settings = job.recipe.efficient.training
    own = architecture == sizes.architecture
    unet = bundle.unet if own else nn.Module.to(build_unet(architecture), device=bundle.device)
    unet.requires_grad_(requires_grad=True)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    rows = min(settings.trainer.micro_batch, settings.loop.global_batch)
    batch = Batch(
        ids=tuple(f"probe/{row}" for row in range(rows)),
        columns={
            "latent": torch.randn(rows, *bundle.latent_shape),
            "token_ids": bundle.tokenize([_CAPTION] * rows),
        },
    )
    objective = VelocityObjective(
        settings.velocity, captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=settings.loop.seed
    )
    step, update = step_seconds(unet, objective=objective, batch=batch, loop=settings.loop)
    network = sizes.of(architecture)
    if own:
        measured.add("update", update / (network.parameters / 1e6))
    measured.add("train", (step - measured.update_seconds(network)) / rows, gmacs=network.gmacs)
    unet.requires_grad_(requires_grad=False)


def _measure_decoder_training(
    job: Job, bundle: Bundle, *, sizes: NetworkSizes, measured: _Measurements
) -> None:
    """Rate of train_decoder."""
    loop, trainer = job.recipe.decoder.loop, job.recipe.decoder.trainer
    rows = min(max(1, loop.global_batch // trainer.num_workers), trainer.micro_batch)
    step = decoder_step(bundle, loop=loop, rows=rows)
    seconds = (step - measured.update_seconds(sizes.half)) / rows
    measured.add("train_decoder", seconds, gmacs=sizes.half.gmacs)


def _export_seconds(bundle: Bundle, *, tokens: int) -> float:
    """CPU seconds of the export of the model's UNet."""
    unet = copy.deepcopy(bundle.unet).eval()
    width = int(unet.config["cross_attention_dim"])
    inputs = (
        torch.randn(2, *bundle.latent_shape),
        torch.full((2,), 999.0),
        torch.randn(2, tokens, width),
    )
    times = list[float]()
    with torch.no_grad():
        for _ in range(MIN_REPEATS):
            began = time.process_time()
            torch.export.export(unet, inputs)
            times.append(time.process_time() - began)
    return statistics.median(times)
