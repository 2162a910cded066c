"""Which UNets are timed, in what, and where: what the jobs that take times have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.evaluation.settings import TimingSettings
from snapfusion.evolution.latency import LatencyError, MeasurementSetup
from snapfusion.evolution.runtimes import make_benchmark, make_runner
from snapfusion.models.architecture import Architecture, ArchitectureError, efficient_architecture

ORIGIN, TABLE_3 = "origin", "table-3"
"""The model's own UNet, and Table 3's of it."""


def setting_of(settings: TimingSettings) -> MeasurementSetup:
    """Where and how this machine measures.

    Raises:
        LatencyError: if it has not the device.
    """
    on_cpu = settings.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise LatencyError("the device is cuda, of which torch finds none here; cpu is accepted")
    return MeasurementSetup(
        device=_processor() if on_cpu else torch.cuda.get_device_name(),
        runtime=settings.runtime,
        precision=settings.precision,
        threads=settings.threads if on_cpu else 0,
    )


def _processor() -> str:
    """What the machine calls its CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, f"CPU, {torch.backends.cpu.get_cpu_capability()}")


def architectures_of(origin: Architecture) -> dict[str, Architecture]:
    """A model's architecture, and Table 3's of it where it has the levels for one."""
    try:
        return {ORIGIN: origin, TABLE_3: efficient_architecture(origin)}
    except ArchitectureError:
        return {ORIGIN: origin}


_LAST_TIMESTEP = 999.0


def benchmark_of(
    settings: TimingSettings, network: nn.Module, inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """A function that runs `network` once on `inputs`; see `snapfusion.evolution.runtimes.make_benchmark`."""
    return make_benchmark(
        network,
        inputs,
        runtime=settings.runtime,
        precision=settings.precision,
        device=torch.device(settings.device),
    )


def runner_of(
    settings: TimingSettings, network: nn.Module, inputs: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """`network` as a function of tensors; see `snapfusion.evolution.runtimes.make_runner`."""
    return make_runner(
        network,
        inputs,
        runtime=settings.runtime,
        precision=settings.precision,
        device=torch.device(settings.device),
    )


def unet_inputs(
    settings: TimingSettings, architecture: Architecture, *, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a UNet in the shapes that it has in use, float32 on the CPU."""
    side = architecture.sample_size
    return (
        torch.randn(settings.batch, architecture.in_channels, side, side),
        torch.full((settings.batch,), _LAST_TIMESTEP),
        torch.randn(settings.batch, tokens, architecture.context),
    )
