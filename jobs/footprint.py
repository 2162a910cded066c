"""The memory that a UNet takes, alone in a fresh process, with random weights. SnapFusion Table 5.

On the CPU it is the process's resident memory, as Linux counts it; of the process's own, before there is a
UNet, nothing is counted as the UNet's. On a GPU it is what torch has allocated there.
"""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import torch
from pydantic import NonNegativeFloat

from jobs.timing import TimingSettings
from pipelines.rejection import Rejected
from pipelines.stages.isolation import Isolation
from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import build
from snapfusion.settings import Settings

_STEPS = 2
"""The first makes what stays, such as buffers."""
_SECONDS = 7200.0
_MB = 1e6
_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")
_THE_HIGHEST = "5"


class FootprintError(RuntimeError):
    """Memory that could not be measured; the message says why."""


class Footprint(Settings):
    """Memory of a process with a UNet, in MB of 10^6 bytes.

    Attributes:
        before_mb: without the UNet.
        at_rest_mb: with it, before the first step.
        highest_mb: while it steps.
    """

    before_mb: NonNegativeFloat
    at_rest_mb: NonNegativeFloat
    highest_mb: NonNegativeFloat

    @property
    def unet_mb(self) -> float:
        """The UNet's own at its highest: weights, and what a step needs."""
        return self.highest_mb - self.before_mb


def footprint_of(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    """Measured in a process that is started for it and then ended.

    Raises:
        LatencyError: if the runtime cannot do it.
        FootprintError: if the process does not live to the end, most likely for want of memory.
    """
    step = partial(_step_alone, settings=settings, tokens=tokens)
    with Isolation(step, timeout=_SECONDS, tries=1) as alone:
        try:
            return alone(architecture)
        except Rejected as error:
            raise FootprintError(
                f"a process with one UNet alone did not finish ({error.reason}: {error.detail}); it may want "
                "more memory than there is"
            ) from None


def _step_alone(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    torch.set_num_threads(settings.threads)
    meter = ResidentMemory() if settings.device == "cpu" else _OnCuda()
    before = meter.now_mb()
    inputs = settings.inputs_of(architecture, tokens=tokens)
    step = settings.ready(build(architecture).eval(), inputs)
    meter.forget_highest()
    at_rest = meter.now_mb()
    for _ in range(_STEPS):
        step()
    return Footprint(before_mb=before, at_rest_mb=at_rest, highest_mb=meter.highest_mb())


class ResidentMemory:
    """Resident memory of this process, in MB of 10^6 bytes.

    Where there is no /proc, as on a Mac, all that is known is the highest since the process began.
    """

    def now_mb(self) -> float:
        """What it holds."""
        return _told("VmRSS")

    def forget_highest(self) -> None:
        """Begin anew: else the highest would be that of making a network, in float32 and perhaps twice."""
        if _FORGET.exists():
            _FORGET.write_text(_THE_HIGHEST)

    def highest_mb(self) -> float:
        """The most that it held since then."""
        # Not what getrusage tells: a child's begins with its parent's.
        return _told("VmHWM")


class _OnCuda:
    """What torch has allocated on the GPU."""

    def now_mb(self) -> float:
        return torch.cuda.memory_allocated() / _MB

    def forget_highest(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def highest_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / _MB


def _told(name: str) -> float:
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MB  # of a Mac, where it is in bytes
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / _MB
