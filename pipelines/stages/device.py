"""Runs networks on a torch device, and names what their outputs' bits depend on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch

from pipelines.stages.settings import Device
from pipelines.tables.units import FinishedRows, UnitRows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Rows = TypeVar("Rows", bound=UnitRows)


def prepare(device: Device) -> str:
    """Set the number of threads of this process; returns the torch device to use."""
    # Sums are split over threads, so the number of threads decides the last bits.
    torch.set_num_threads(device.threads)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device.kind == "auto" else device.kind


def environment_of(device: Device) -> dict[str, Any]:
    """The environment recorded in a unit's manifest; within equal environments rows have equal bits."""
    name = prepare(device)
    kind = torch.cuda.get_device_name() if name == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{name} {kind}",
        "dtype": device.dtype,
        "threads": device.threads,
        "torch": torch.__version__,
    }


class NetworkStage(ABC, Generic[Rows]):
    """Base of the stages that run a network on all rows of a unit; each lives in an actor."""

    def __init__(self, device: Device) -> None:
        self.torch_device = prepare(device)
        self.dtype = DTYPES[device.dtype]
        self.environment = environment_of(device)

    @abstractmethod
    def columns(self, rows: Rows) -> tuple[dict[str, Any], list[bool]]:
        """The table's columns for all rows, and whether each row is finite.

        Batches must depend on the unit alone: recomputing it must give the same bits.
        """

    def __call__(self, rows: Rows) -> FinishedRows:
        """The finished unit; rows that are not finite are rejected."""
        began = time.monotonic()
        columns, finite = self.columns(rows)
        seconds = time.monotonic() - began
        return rows.finish(columns, finite=finite, environment=self.environment, seconds=seconds)
