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

from jobs.evaluation.settings import TimingSettings
from jobs.evaluation.timing import benchmark_of, unet_inputs
from pipelines.rejections import Rejected
from pipelines.stages.isolation import Isolation
from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import build_unet
from snapfusion.settings import Settings

_NUM_STEPS = 2
"""The first makes what stays, such as buffers."""
_TIMEOUT_SECONDS = 7200.0
_MB = 1e6
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


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


def measure_footprint(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    """Measured in a process that is started for it and then ended.

    Raises:
        LatencyError: if the runtime cannot do it.
        FootprintError: if the process does not live to the end, most likely for want of memory.
    """
    step = partial(_measure_isolated, settings=settings, tokens=tokens)
    with Isolation(step, timeout=_TIMEOUT_SECONDS, tries=1) as alone:
        try:
            return alone(architecture)
        except Rejected as error:
            raise FootprintError(
                f"a process with one UNet alone did not finish ({error.reason}: {error.detail}); it may want "
                "more memory than there is"
            ) from None


def _measure_isolated(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    torch.set_num_threads(settings.threads)
    meter = ResidentMemory() if settings.device == "cpu" else CudaMemory()
    before = meter.now_mb()
    inputs = unet_inputs(settings, architecture, tokens=tokens)
    step = benchmark_of(settings, build_unet(architecture).eval(), inputs)
    meter.forget_highest()
    at_rest = meter.now_mb()
    for _ in range(_NUM_STEPS):
        step()
    return Footprint(before_mb=before, at_rest_mb=at_rest, highest_mb=meter.highest_mb())


class ResidentMemory:
    """Resident memory of this process, in MB of 10^6 bytes.

    Where there is no /proc, as on a Mac, all that is known is the highest since the process began.
    """

    def now_mb(self) -> float:
        """What it holds."""
        return _proc_status_mb("VmRSS")

    def forget_highest(self) -> None:
        """Begin anew: else the highest would be that of making a network, in float32 and perhaps twice."""
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def highest_mb(self) -> float:
        """The most that it held since then."""
        # Not what getrusage tells: a child's begins with its parent's.
        return _proc_status_mb("VmHWM")


class CudaMemory:
    """What torch has allocated on the GPU."""

    def now_mb(self) -> float:
        return torch.cuda.memory_allocated() / _MB

    def forget_highest(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def highest_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / _MB


def _proc_status_mb(name: str) -> float:
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MB  # of a Mac, where it is in bytes
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / _MB
