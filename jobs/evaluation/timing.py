"""Timed networks and their inputs, the measuring machine, and the UNets that are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from jobs.evaluation.settings import ORIGIN, TABLE_3, TimingSettings
from snapfusion.evolution.latency import LatencyError, MeasurementSetup
from snapfusion.evolution.runtimes import Backend
from snapfusion.models.architecture import Architecture, ArchitectureError, efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build_unet
from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule

_LAST_TIMESTEP = 999.0


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """The parts of a Stable Diffusion that are measured.

    Attributes:
        architecture: of its UNet.
        vae: its VAE.
        schedule: of the sampling loop.
        prediction_type: of its UNet.
        tokens: of an encoded caption.
    """

    architecture: Architecture
    vae: AutoencoderKL
    schedule: Schedule
    prediction_type: PredictionType
    tokens: int


def load_measured_model(source: str, *, settings: TimingSettings) -> MeasuredModel:
    """Load the parts of a model that are measured; its own UNet is not kept in memory beside them."""
    bundle = load(source)
    return MeasuredModel(
        architecture=architecture_of(bundle.unet),
        vae=bundle.vae,
        schedule=bundle.schedule,
        prediction_type=bundle.prediction_type,
        tokens=settings.tokens_of(bundle.tokenizer),
    )


def setting_of(settings: TimingSettings) -> MeasurementSetup:
    """Device, runtime, precision and threads of a measurement on this machine.

    Raises:
        LatencyError: if the device is missing.
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
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, f"CPU, {torch.backends.cpu.get_cpu_capability()}")


def unet_benchmark(
    settings: TimingSettings, architecture: Architecture, *, tokens: int
) -> Callable[[], object]:
    """A function that runs a UNet of random weights once."""
    inputs = unet_inputs(settings, architecture, tokens=tokens)
    return backend_of(settings).benchmark(build_unet(architecture).eval(), inputs)


def backend_of(settings: TimingSettings) -> Backend:
    """The backend that runs the networks."""
    device = torch.device(settings.device)
    return Backend(runtime=settings.runtime, precision=settings.precision, device=device)


def unet_inputs(settings: TimingSettings, architecture: Architecture, *, tokens: int) -> tuple[Tensor, ...]:
    """Random inputs z_t, t and c of a UNet, float32 on the CPU."""
    side = architecture.sample_size
    return (
        torch.randn(settings.batch, architecture.in_channels, side, side),
        torch.full((settings.batch,), _LAST_TIMESTEP),
        torch.randn(settings.batch, tokens, architecture.context),
    )


def architectures_of(origin: Architecture) -> dict[str, Architecture]:
    """A model's architecture, and Table 3's of it if it has enough levels."""
    try:
        return {ORIGIN: origin, TABLE_3: efficient_architecture(origin)}
    except ArchitectureError:
        return {ORIGIN: origin}
