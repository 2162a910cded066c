"""Benchmarks one module of a model in one runtime, in a process of its own: latency and memory."""

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

from jobs.evaluation.memory import ResidentMemory, run_alone
from snapfusion.export.coreml_package import describe_package
from snapfusion.export.executorch import ExecuTorchProgram, describe_program, set_num_threads
from snapfusion.export.loop import RunModule
from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load_network
from snapfusion.settings import Settings

WARM_UPS = 3
"""Runs that are not counted, after the first one, which is part of loading."""


class RuntimeUnavailableError(ValueError):
    """A runtime that cannot run here; the message says why."""


class ModuleBenchmark(Settings):
    """Latency and memory of a module in a runtime. Memory is resident, in MB of 10^6 bytes.

    Attributes:
        load_s: seconds from the file to the first output, without importing the runtime.
        median_ms: median latency in milliseconds.
        p95_ms: 95th percentile of the latency in milliseconds.
        repeats: timed runs.
        before_mb: memory of the process before the module is loaded.
        loading_mb: peak above that until the first output.
        running_mb: peak above that during the timed runs.
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
    """A module, its inputs, and how often it is run.

    Attributes:
        module: "text_encoder", "unet" or "decoder".
        inputs: of the module.
        threads: of torch, ExecuTorch and ONNX Runtime; Core ML decides by itself.
        repeats: timed runs.
    """

    module: str
    inputs: tuple[np.ndarray, ...]
    threads: int
    repeats: int


class ModuleRuntime(Protocol):
    """Loads and runs modules."""

    def prepare(self, run: ModuleRun) -> None:
        """Import the runtime, which is no part of loading a module."""

    def open(self, run: ModuleRun) -> Callable[[], object]:
        """Load the module; the returned function runs it once.

        Raises:
            RuntimeUnavailableError: if the runtime cannot run here; the first run may raise it too.
        """


def benchmark_module(runtime: ModuleRuntime, run: ModuleRun) -> ModuleBenchmark:
    """Benchmark a module in a process of its own, which ends afterwards.

    Raises:
        RuntimeUnavailableError: if the runtime cannot run here.
        FootprintError: if the process does not finish, most likely because memory runs out.
        ValueError: if the model, the decoder or the program cannot be loaded.
    """
    return run_alone(_measure, (runtime, run), what="its process")


def _measure(arguments: tuple[ModuleRuntime, ModuleRun]) -> ModuleBenchmark:
    runtime, run = arguments
    torch.set_num_threads(run.threads)
    runtime.prepare(run)
    meter = ResidentMemory()
    # Importing a runtime takes memory of its own, which must not count as the module's peak.
    meter.reset_peak()
    before = meter.now_mb()
    began = time.perf_counter()
    call = runtime.open(run)
    call()
    load_s = time.perf_counter() - began
    loading = meter.peak_mb()
    for _ in range(WARM_UPS):
        call()
    meter.reset_peak()
    times = [_milliseconds(call) for _ in range(run.repeats)]
    return ModuleBenchmark(
        load_s=load_s,
        median_ms=statistics.median(times),
        p95_ms=statistics.quantiles(times, n=20, method="inclusive")[-1],
        repeats=run.repeats,
        before_mb=before,
        # May be negative: memory that the imports left unused may have been returned meanwhile.
        loading_mb=max(0.0, loading - before),
        running_mb=max(0.0, meter.peak_mb() - before),
    )


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000.0 * (time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class TorchRuntime:
    """Torch in float32 on the CPU.

    Attributes:
        model: source of the model.
        decoder: source of a half-width decoder; None for the model's own.
        compiled: whether to use torch.compile, whose time is part of loading.
    """

    model: str
    decoder: str | None
    compiled: bool

    def prepare(self, run: ModuleRun) -> None:
        """Disable the compiler's caches: the result of an earlier benchmark would load in no time."""
        if self.compiled:
            config: Any = importlib.import_module("torch._inductor.config")
            config.force_disable_caches = True
            warnings.filterwarnings("ignore", message=".*force disabled")
            config.compile_threads = run.threads
            importlib.import_module("torch._inductor.compile_fx")

    def open(self, run: ModuleRun) -> Callable[[], object]:
        """Load the module's network alone."""
        module = self._module(run)
        network = torch.compile(module.network, dynamic=False) if self.compiled else module.network
        inputs = [
            torch.from_numpy(array.copy()).to(port.dtype)
            for array, port in zip(run.inputs, module.inputs, strict=True)
        ]

        @torch.inference_mode()
        def call() -> object:
            try:
                return network(*inputs)
            except RuntimeError as error:
                if not self.compiled:
                    raise
                raise RuntimeUnavailableError(_compile_error(error)) from None

        return call

    def _module(self, run: ModuleRun) -> FixedModule:
        if run.module == "text_encoder":
            text_encoder = load_network(self.model, part="text_encoder")
            return text_encoder_module(text_encoder, length=run.inputs[0].shape[1])
        if run.module == "unet":
            conditions, *shape = run.inputs[2].shape
            unet = load_network(self.model, part="unet")
            return unet_module(unet, condition_shape=tuple(shape), conditions=conditions)
        decoder = load_decoder(self.decoder) if self.decoder else load_network(self.model, part="vae")
        return decoder_module(decoder, latent_shape=run.inputs[0].shape[1:])


def _compile_error(error: RuntimeError) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"not compiled here: torch.compile needs a working C++ compiler ($CXX, or g++): {reason}"


@dataclass(frozen=True, kw_only=True)
class ExecuTorchRuntime:
    """The ExecuTorch runtime."""

    program: Path

    def prepare(self, run: ModuleRun) -> None:
        """Import the runtime and set its threads, which must precede opening a program."""
        describe_program(self.program)
        set_num_threads(run.threads)

    def open(self, run: ModuleRun) -> Callable[[], object]:
        """Load the program, which packs its weights."""
        return _open(ExecuTorchProgram, self.program, run)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime, which takes the number of threads from torch."""

    model: Path

    def prepare(self, run: ModuleRun) -> None:
        """Import the runtime."""
        importlib.import_module("onnxruntime")

    def open(self, run: ModuleRun) -> Callable[[], object]:
        """Load the model, which ONNX Runtime optimizes."""
        return _open(OnnxProgram, self.model, run)


def _open(program: Callable[[Path], RunModule], path: Path, run: ModuleRun) -> Callable[[], object]:
    try:
        execute = program(path)
    except ValueError as error:
        raise RuntimeUnavailableError(f"not executed here: {error}") from None
    return lambda: execute(run.inputs)


@dataclass(frozen=True, kw_only=True)
class CoreMLRuntime:
    """Core ML, with packages that run one after the other; on a Mac only."""

    packages: Sequence[Path]

    def prepare(self, run: ModuleRun) -> None:
        """Import coremltools, by describing a package."""
        describe_package(self.packages[0])

    def open(self, run: ModuleRun) -> Callable[[], object]:
        """Load the packages, which Core ML compiles for the device."""
        from snapfusion.export.coreml_package import open_packages

        model = open_packages(self.packages)
        return lambda: model(run.inputs)
