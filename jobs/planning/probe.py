"""Measures this machine's rates, a unit of each kind of work, in a minute or two.

render, read, encode, write   scenes, and two units of LATENTS, by the pipeline's stages in this process
pass, decode, write_image     the teacher's stage of PAIRS, with 2 and with 6 steps
train, update                 the training loop on Eq. 6, of the model's own UNet and of the efficient one
train_decoder                 the training loop on the half-width decoder
compile                       the export of a UNet, times a measured ratio of a bundle to it
commit, save_weights, ...     what a driver does after the last row (`jobs.planning.driver_rates`)
starts, crowding              a data job and a training of the miniature, through Ray

Everything but Ray's own start is measured while Ray runs, as in a run. On a machine with accelerators
nothing is compiled, and one accelerator is measured alone.
"""

import copy
import itertools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import nn

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.cli.scenes import render_scenes
from jobs.evaluation.settings import TimingSettings
from jobs.evaluation.timing import setting_of, unet_inputs
from jobs.planning import timings
from jobs.planning.driver_rates import driver_mib, measure_driver
from jobs.planning.rates_and_prices import Rate, Rates
from jobs.runtime.cluster import connect
from jobs.runtime.logs import logger
from jobs.training.initial_weights import named_architecture
from pipelines.costs.stage import WorkKind
from pipelines.datasets.latents import encode_latents
from pipelines.ray_data.execution import PipelineStage
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


def probe(job: Job, *, sizes: NetworkSizes) -> Rates:
    """Measure this machine for a job's recipe, on one thread from now on, and print what is measured next.

    Raises:
        SettingsError: if the recipe needs a device that this machine lacks.
    """
    _check_device(job)
    # Rates are those of one worker, which has one thread.
    torch.set_num_threads(1)
    own, device = sizes.architecture, _device()
    efficient = named_architecture(job.resolve(job.recipe.efficient.architecture), own=own)
    with tempfile.TemporaryDirectory() as scratch:
        job = replace(job, out=scratch)
        found = Probe(job=job, sizes=sizes)
        logger.info("  measuring the start of Ray")
        ray_seconds = timings.seconds_of(partial(connect, job.recipe.cluster))
        logger.info("  measuring rows: read, encoded, written")
        found.measure_rows()
        logger.info("  measuring the teacher's passes")
        png_share = found.measure_teacher()
        logger.info("  measuring training steps")
        bundle = load(job.recipe.model, device=device)
        for architecture in dict.fromkeys((own, efficient)):
            found.measure_training(bundle, architecture)
        found.measure_decoder_training(bundle)
        logger.info("  measuring a UNet's export")
        if device == "cpu":
            found._add("compile", COMPILE_PER_EXPORT * _export_seconds(bundle, sizes))
        del bundle
        logger.info("  measuring the driver's work after the last row")
        found.measure_driver()
        logger.info("  measuring a data job and a training through Ray")
        starts, contention = timings.measure_overhead(
            url=job.url("overhead"), workers=_contending_workers(job), ray_seconds=ray_seconds
        )
        setting = setting_of(TimingSettings(device=device))  # type: ignore[arg-type] # cpu or cuda
        return Rates(
            name=f"probe of {setting.device}",
            worker=setting.device if device == "cuda" else f"one thread of {setting.device}",
            date=datetime.now(UTC).date().isoformat(),
            about=f"measured by recipe {job.recipe.name} on this machine, {os.cpu_count()} cores",
            rates={kind: tuple(rates) for kind, rates in found.rates.items()},
            checkpointed=job.recipe.efficient.training.gradient_checkpointing,
            crowding=contention,
            starts=starts,
            png_share=png_share,
            driver_mib=driver_mib(),
        )


@dataclass(kw_only=True)
class Probe:
    """Measurement of this machine with a job's recipe, in an empty folder, and the rates measured so far."""

    job: Job
    sizes: NetworkSizes
    rates: dict[WorkKind, list[Rate]] = field(default_factory=lambda: defaultdict(list))

    def measure_rows(self) -> None:
        """Rates of render, read, encode and write, from two units of LATENTS."""
        job, recipe = self.job, self.job.recipe
        if recipe.source.url is None:
            count = max(_SCENES, _UNITS * recipe.latents.rows_per_unit)
            scenes = recipe.source.model_copy(update={"scenes": count, "scenes_per_shard": count})
            rendering = replace(job, recipe=recipe.model_copy(update={"source": scenes}))
            self._add("render", timings.seconds_of(partial(render_scenes, rendering)) / count)
        times: dict[str, list[float]] = defaultdict(list)
        shards, run = list_shards(shards_url(job))[:1], partial(run_timed, times=times, results=_UNITS)
        settings, url = recipe.latents, job.url("latents")
        table = encode_latents(settings, model=recipe.model, shards=shards, source="probe", url=url, run=run)
        if not table.num_rows:
            raise SettingsError(
                f"--set source.url: no row in the first {_UNITS} units of {shards[0].url} is usable, so "
                "nothing can be measured"
            )
        rows = max(file.rows for file in table.units)
        # The first call of a stage initializes libraries, so the fastest one counts.
        self._add("read", min(times["ReadShard"]) / rows)
        self._add("encode", min(times["EncodeLatents"]) / rows, gmacs=self.sizes.encoder_gmacs)
        self._add("write", min(times["WriteUnit"]) / rows)

    def measure_teacher(self) -> float:
        """Rates of pass, decode and write_image; returns a PNG's size as a fraction of its pixels' bytes."""
        generation = self.job.recipe.pairs.generation
        rows, images = generation.batch_size, _batch_of_pairs(self.job, steps=_FEW_STEPS, images=True)
        few, more = (
            timings.median_seconds(_batch_of_pairs(self.job, steps=steps, images=False), least=SECONDS)
            for steps in (_FEW_STEPS, _MORE_STEPS)
        )
        passes = (_MORE_STEPS - _FEW_STEPS) * (2 if generation.is_guided else 1) * rows
        self._add("pass", (more - few) / passes, gmacs=self.sizes.unet.gmacs)
        decoded = timings.median_seconds(images, least=SECONDS) - few
        self._add("decode", decoded / rows, gmacs=self.sizes.decoder_gmacs)
        batch = images()[1]
        written = timings.median_seconds(lambda: [to_png(image) for image in batch], least=SECONDS)
        self._add("write_image", written / rows)
        return sum(len(to_png(image)) for image in batch) / batch.nbytes

    def measure_training(self, bundle: Bundle, architecture: Architecture) -> None:
        """Rates of train and update, of a UNet of one architecture; that of the model itself comes first."""
        settings, network = self.job.recipe.efficient.training, self.sizes.of(architecture)
        own = architecture == self.sizes.architecture
        unet = bundle.unet if own else nn.Module.to(build_unet(architecture), device=bundle.device)
        unet.requires_grad_(requires_grad=True)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        rows = min(settings.trainer.micro_batch, settings.loop.global_batch)
        captions, seed = CaptionEncoder(bundle), settings.loop.seed
        objective = VelocityObjective(
            settings.velocity, captions=captions, schedule=bundle.schedule, seed=seed
        )
        batch = timings.noise_batch(bundle, rows, token_ids=bundle.tokenize([_CAPTION] * rows))
        step, update = timings.step_seconds(unet, objective=objective, batch=batch, loop=settings.loop)
        if own:
            self._add("update", update / (network.parameters / 1e6))
        self._add_step("train", network, step=step, rows=rows)
        unet.requires_grad_(requires_grad=False)

    def measure_decoder_training(self, bundle: Bundle) -> None:
        """Rate of train_decoder."""
        loop, trainer = self.job.recipe.decoder.loop, self.job.recipe.decoder.trainer
        rows = min(max(1, loop.global_batch // trainer.num_workers), trainer.micro_batch)
        step = timings.decoder_step(bundle, loop=loop, rows=rows)
        self._add_step("train_decoder", self.sizes.half, step=step, rows=rows)

    def measure_driver(self) -> None:
        """Rates of what a driver does after the last row."""
        features = self.job.recipe.evaluation.samples.judging.feature_count
        for kind, rate in measure_driver(url=self.job.url("driver"), features=features):
            self.rates[kind].append(rate)

    def _add_step(self, kind: WorkKind, network: Cost, *, step: float, rows: int) -> None:
        # A forecast adds the optimizer's update; the rest of a step is the rows' time.
        update = self.rates["update"][0].seconds * network.parameters / 1e6
        self._add(kind, (step - update) / rows, gmacs=network.gmacs)

    def _add(self, kind: WorkKind, seconds: float, *, gmacs: float | None = None) -> None:
        # A difference of two times can be zero or less on a busy machine.
        self.rates[kind].append(Rate(seconds=max(seconds, 1e-9), gmacs=gmacs))


def _contending_workers(job: Job) -> int:
    """Workers that fill every core of this machine, if the recipe ever has as many; else one."""
    recipe, cores = job.recipe, os.cpu_count() or 1
    pools = (recipe.latents.encoders, recipe.pairs.teachers, recipe.targets.teachers)
    trainings = (recipe.vpred, recipe.efficient.training, recipe.distill, recipe.decoder)
    workers = max(*(pool.most_actors for pool in pools), *(each.trainer.num_workers for each in trainings))
    return cores if _device() == "cpu" and workers >= cores else 1


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_device(job: Job) -> None:
    for name in ("latents", "pairs", "targets"):
        if getattr(job.recipe, name).device.kind == "cuda" and _device() == "cpu":
            raise SettingsError(
                f"--set plan.rates: recipe {job.recipe.name} needs an accelerator ({name}.device.kind), and "
                "torch finds none here to probe; give rates, or probe on a node of the cluster"
            )


def run_timed(
    items: Iterable[Any], stages: list[PipelineStage], *, times: dict[str, list[float]], results: int
) -> Iterator[Any]:
    """Run stages in this process up to so many results, and time each by the name of its class."""
    for stage in stages:
        items = _timed_stage(stage.create(), items, times[stage.build.__name__])
    yield from itertools.islice(items, results)


def _timed_stage(work: Callable[[Any], Any], items: Iterable[Any], times: list[float]) -> Iterator[Any]:
    for item in items:
        began = time.perf_counter()
        result = work(item)
        for one in result if isinstance(result, Iterator) else (result,):
            times.append(time.perf_counter() - began)
            yield one
            began = time.perf_counter()


def _batch_of_pairs(job: Job, *, steps: int, images: bool) -> Callable[[], Any]:
    """A call that generates one batch of PAIRS: latents and images."""
    pairs = job.recipe.pairs
    settings = pairs.generation.model_copy(update={"steps": steps, "images": images})
    stage = GeneratePairs(model=job.recipe.model, settings=settings, device=pairs.device)
    ids = stage.bundle.tokenize([_CAPTION] * settings.batch_size)
    keys = [noise_key("probe", row) for row in range(settings.batch_size)]
    return lambda: stage.generate_batch(ids, keys)


def _export_seconds(bundle: Bundle, sizes: NetworkSizes) -> float:
    """CPU seconds of the export of the model's UNet."""
    unet = copy.deepcopy(bundle.unet).eval()
    inputs = unet_inputs(TimingSettings(), sizes.architecture, tokens=sizes.tokens)
    with torch.no_grad():
        return timings.median_seconds(lambda: torch.export.export(unet, inputs), clock=time.process_time)
