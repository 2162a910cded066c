"""One module of a model by one runtime, alone in a fresh process: how long it takes, in how much memory."""

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt

from jobs.evaluation.memory import FootprintError, ResidentMemory
from pipelines.rejections import Rejected
from pipelines.stages.isolation import Isolation
from snapfusion.export.coreml import describe_package
from snapfusion.export.executorch import ExecuTorchProgram, describe_program, set_num_threads
from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load_network
from snapfusion.settings import Settings

WARM_UPS = 3
"""Runs that are not counted, after the one that loading ends with."""
_TIMEOUT_SECONDS = 7200.0


class RuntimeUnavailableError(ValueError):
    """A runtime that cannot run here; the message says why."""


class ModuleBenchmark(Settings):
    """What a module takes by one runtime. Memory is resident, in MB of 10^6 bytes.

    Attributes:
        load_s: seconds from its file to its first output; the runtime itself is there already.
        median_ms: milliseconds of a run.
        p95_ms: milliseconds that 95 of 100 runs stay below.
        repeats: runs of which these are.
        before_mb: of the process, before the module is loaded.
        loading_mb: that is added until the first output is there, at the highest.
        running_mb: that is added while it runs, at the highest.
    """

    load_s: NonNegativeFloat
    median_ms: NonNegativeFloat
    p95_ms: NonNegativeFloat
    repeats: PositiveInt
    before_mb: NonNegativeFloat
    loading_mb: NonNegativeFloat
    running_mb: NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class ModuleRun:
    """What is run.

    Attributes:
        module: "text_encoder", "unet" or "decoder".
        inputs: of it.
        threads: of torch and of ExecuTorch; Core ML has its own ways.
        repeats: how often it is timed.
    """

    module: str
    inputs: tuple[np.ndarray, ...]
    threads: int
    repeats: int


class ModuleRuntime(Protocol):
    """What runs a module."""

    def prepare(self, work: ModuleRun) -> None:
        """Import what it is made of, which is no part of loading a module."""

    def open(self, work: ModuleRun) -> Callable[[], object]:
        """Load the module; what comes back runs it once.

        Raises:
            AbsentError: if the runtime cannot run here; so may the first run.
        """


def benchmark_module(runtime: ModuleRuntime, work: ModuleRun) -> ModuleBenchmark:
    """Measured in a process that is started for it and then ended.

    Raises:
        AbsentError: if the runtime cannot run here.
        FootprintError: if the process does not live to the end, most likely for want of memory.
        ValueError: if the model, the decoder or the program cannot be loaded.
    """
    with Isolation(_measure, timeout=_TIMEOUT_SECONDS, tries=1) as alone:
        try:
            return alone((runtime, work))
        except Rejected as error:
            raise FootprintError(
                f"its process did not finish ({error.reason}: {error.detail}); it may want more memory than "
                "there is"
            ) from None


def _measure(asked: tuple[ModuleRuntime, ModuleRun]) -> ModuleBenchmark:
    runtime, work = asked
    torch.set_num_threads(work.threads)
    runtime.prepare(work)
    meter = ResidentMemory()
    meter.forget_highest()
    before = meter.now_mb()
    began = time.perf_counter()
    run = runtime.open(work)
    run()
    load_s = time.perf_counter() - began
    loading = meter.highest_mb()
    for _ in range(WARM_UPS):
        run()
    meter.forget_highest()
    times = [_milliseconds(run) for _ in range(work.repeats)]
    return ModuleBenchmark(
        load_s=load_s,
        median_ms=statistics.median(times),
        p95_ms=statistics.quantiles(times, n=20, method="inclusive")[-1],
        repeats=work.repeats,
        before_mb=before,
        # What the imports had left unused may be given back meanwhile.
        loading_mb=max(0.0, loading - before),
        running_mb=max(0.0, meter.highest_mb() - before),
    )


def _milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000.0 * (time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class TorchRuntime:
    """Torch in float32 on the CPU.

    Attributes:
        model: whose modules they are.
        decoder: of the half-width decoder; None for the model's own.
        compiled: by torch.compile, whose time is part of loading.
    """

    model: str
    decoder: str | None
    compiled: bool

    def prepare(self, work: ModuleRun) -> None:
        """Of a compiler, have it compile anew: what an earlier benchmark left would be no time at all."""
        if self.compiled:
            config: Any = importlib.import_module("torch._inductor.config")
            config.force_disable_caches = True
            warnings.filterwarnings("ignore", message=".*force disabled")  # which is what was asked for
            config.compile_threads = work.threads
            importlib.import_module("torch._inductor.compile_fx")

    def open(self, work: ModuleRun) -> Callable[[], object]:
        """Load the network, and no other of the model."""
        module = self._module(work)
        network = torch.compile(module.network, dynamic=False) if self.compiled else module.network
        given = [
            torch.from_numpy(array.copy()).to(port.dtype)
            for array, port in zip(work.inputs, module.inputs, strict=True)
        ]

        @torch.inference_mode()
        def run() -> object:
            try:
                return network(*given)
            except RuntimeError as error:
                if not self.compiled:
                    raise
                raise RuntimeUnavailableError(_compile_error(error)) from None

        return run

    def _module(self, work: ModuleRun) -> FixedModule:
        if work.module == "text_encoder":
            text_encoder = load_network(self.model, part="text_encoder")
            return text_encoder_module(text_encoder, length=work.inputs[0].shape[1])
        if work.module == "unet":
            conditions, *shape = work.inputs[2].shape
            unet = load_network(self.model, part="unet")
            return unet_module(unet, condition_shape=tuple(shape), conditions=conditions)
        decoder = load_decoder(self.decoder) if self.decoder else load_network(self.model, part="vae")
        return decoder_module(decoder, latent_shape=work.inputs[0].shape[1:])


def _compile_error(error: RuntimeError) -> str:
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"not compiled here: torch.compile needs a working C++ compiler ($CXX, or g++) and says: {told}"


@dataclass(frozen=True, kw_only=True)
class ExecuTorchRuntime:
    """A program in ExecuTorch's runtime."""

    program: Path

    def prepare(self, work: ModuleRun) -> None:
        """The runtime is imported, and its threads are set, before a program is opened."""
        describe_program(self.program)
        set_num_threads(work.threads)

    def open(self, work: ModuleRun) -> Callable[[], object]:
        """Load the program, which packs its weights."""
        try:
            program = ExecuTorchProgram(self.program)
        except ValueError as error:
            raise RuntimeUnavailableError(f"not executed here: {error}") from None
        return lambda: program(work.inputs)


@dataclass(frozen=True, kw_only=True)
class CoreMLRuntime:
    """Packages, one after the other, in Core ML: on a Mac alone."""

    packages: Sequence[Path]

    def prepare(self, work: ModuleRun) -> None:
        """What opens packages is imported by a look at one."""
        describe_package(self.packages[0])

    def open(self, work: ModuleRun) -> Callable[[], object]:
        """Load the packages, which Core ML compiles for the device."""
        from snapfusion.export.coreml import open_packages

        run = open_packages(self.packages)
        return lambda: run(work.inputs)
