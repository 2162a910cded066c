"""Memory of a UNet with random weights, alone in a fresh process. SnapFusion Table 5.

On the CPU it is the process's resident memory, less what it holds before there is a UNet. On a GPU it is what
torch has allocated there.
"""

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import NonNegativeFloat

from jobs.evaluation.settings import TimingSettings
from jobs.evaluation.timing import unet_benchmark
from pipelines.rejections import Rejected
from pipelines.stages.isolation import Isolation
from snapfusion.models.architecture import Architecture
from snapfusion.settings import Settings

Item = TypeVar("Item")
Result = TypeVar("Result")

_NUM_STEPS = 2
"""The first step allocates what stays, such as buffers."""
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
        at_rest_mb: with the UNet, before the first step.
        highest_mb: peak during the steps.
    """

    before_mb: NonNegativeFloat
    at_rest_mb: NonNegativeFloat
    highest_mb: NonNegativeFloat

    @property
    def unet_mb(self) -> float:
        """Peak of the UNet itself: its weights and the memory of a step."""
        return self.highest_mb - self.before_mb


def measure_footprint(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    """Measure in a process of its own, which ends afterwards.

    Raises:
        LatencyError: if the runtime cannot run in that precision or on that device.
        FootprintError: if the process does not finish, most likely because memory runs out.
    """
    measure = partial(_measure, settings=settings, tokens=tokens)
    return run_alone(measure, architecture, what="a process with one UNet")


def run_alone(function: Callable[[Item], Result], item: Item, *, what: str) -> Result:
    """`function(item)` in a process of its own, which ends afterwards; `what` names it in an error.

    Raises:
        FootprintError: if the process does not finish, most likely because memory runs out.
    """
    with Isolation(function, timeout=_TIMEOUT_SECONDS, tries=1) as isolated:
        try:
            return isolated(item)
        except Rejected as error:
            raise FootprintError(
                f"{what} did not finish ({error.reason}: {error.detail}); it may need more memory than there "
                "is"
            ) from None


def _measure(architecture: Architecture, *, settings: TimingSettings, tokens: int) -> Footprint:
    torch.set_num_threads(settings.threads)
    meter = ResidentMemory() if settings.device == "cpu" else _CudaMemory()
    before = meter.now_mb()
    step = unet_benchmark(settings, architecture, tokens=tokens)
    # Building the network may take more than running it: float32 first, and perhaps a second copy.
    meter.reset_peak()
    at_rest = meter.now_mb()
    for _ in range(_NUM_STEPS):
        step()
    return Footprint(before_mb=before, at_rest_mb=at_rest, highest_mb=meter.peak_mb())


class ResidentMemory:
    """Resident memory of this process, in MB of 10^6 bytes.

    Without /proc, as on a Mac, all values are the peak since the process began.
    """

    def now_mb(self) -> float:
        """Current memory."""
        return _proc_status_mb("VmRSS")

    def reset_peak(self) -> None:
        """Let `peak_mb` count from now on."""
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def peak_mb(self) -> float:
        """Peak since the last reset."""
        # Not getrusage: a child's peak begins with its parent's.
        return _proc_status_mb("VmHWM")


class _CudaMemory:
    """Memory that torch has allocated on the GPU, in MB of 10^6 bytes."""

    def now_mb(self) -> float:
        return torch.cuda.memory_allocated() / _MB

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_mb(self) -> float:
        return torch.cuda.max_memory_allocated() / _MB


def _proc_status_mb(name: str) -> float:
    if not _STATUS.exists():
        # In bytes on a Mac.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MB
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / _MB
