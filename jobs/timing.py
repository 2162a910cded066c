"""Which UNets are timed, in what, and where: what the jobs that take times have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from snapfusion.evolution.latency import LatencyError, Precision, Setting
from snapfusion.evolution.runtimes import Runtime, opened, ready
from snapfusion.models.architecture import Architecture, ArchitectureError, table_3
from snapfusion.settings import Settings

ORIGIN, EFFICIENT = "origin", "table-3"
"""The model's own UNet, and Table 3's of it."""
_LAST_STEP = 999.0


class TimingSettings(Settings):
    """How times are taken.

    Attributes:
        runtime: what computes.
        precision: of the networks.
        device: where.
        threads: of the CPU.
        batch: latents at once; 2 is one that is guided.
        tokens: of an encoded caption; null takes as many as the model's tokenizer gives.
        turns: of each thing that is timed.
    """

    runtime: Runtime = "torch"
    precision: Precision = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt = 1
    batch: PositiveInt = 2
    tokens: PositiveInt | None = None
    turns: int = Field(20, ge=2)

    @property
    def name(self) -> str:
        """Of the file of what was measured."""
        return f"{self.runtime}-{self.precision}-{self.device}"

    def tokens_of(self, tokenizer: Any) -> int:  # noqa: ANN401 - a tokenizer of transformers
        """Tokens of an encoded caption."""
        return self.tokens or int(tokenizer.model_max_length)

    def ready(self, network: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
        """Something that runs `network` once on `inputs`; see `snapfusion.evolution.runtimes.ready`."""
        return ready(
            network,
            inputs,
            runtime=self.runtime,
            precision=self.precision,
            device=torch.device(self.device),
        )

    def opened(self, network: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        """`network` as a function; see `snapfusion.evolution.runtimes.opened`."""
        return opened(
            network,
            inputs,
            runtime=self.runtime,
            precision=self.precision,
            device=torch.device(self.device),
        )

    def inputs_of(self, architecture: Architecture, *, tokens: int) -> tuple[Tensor, ...]:
        """Inputs of a UNet's true shapes, float32 on the CPU."""
        side = architecture.sample_size
        return (
            torch.randn(self.batch, architecture.in_channels, side, side),
            torch.full((self.batch,), _LAST_STEP),
            torch.randn(self.batch, tokens, architecture.context),
        )


def setting_of(settings: TimingSettings) -> Setting:
    """Where and how this machine measures.

    Raises:
        LatencyError: if it has not the device.
    """
    on_cpu = settings.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise LatencyError("the device is cuda, of which torch finds none here; cpu is accepted")
    return Setting(
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
        return {ORIGIN: origin, EFFICIENT: table_3(origin)}
    except ArchitectureError:
        return {ORIGIN: origin}
