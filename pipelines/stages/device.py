"""Runs networks on a torch device, and names what their outputs' bits depend on."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch

from pipelines.stages.settings import Device
from pipelines.tables.network_time import UnitSpan
from pipelines.tables.units import FinishedRows, UnitRows
from snapfusion.models.load import load
from snapfusion.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Rows = TypeVar("Rows", bound=UnitRows)
StageSettings = TypeVar("StageSettings", bound=Settings)


def prepare(device: Device) -> str:
    """Set the number of threads of this process; returns the torch device to use."""
    # Sums are split over threads, so the number of threads decides the last bits.
    torch.set_num_threads(device.threads)
    return ("cuda" if torch.cuda.is_available() else "cpu") if device.kind == "auto" else device.kind


def environment_of(device: Device) -> dict[str, Any]:
    """The environment recorded in a unit's manifest; within equal environments rows have equal bits."""
    kind = prepare(device)
    model = torch.cuda.get_device_name() if kind == "cuda" else torch.backends.cpu.get_cpu_capability()
    name = f"{kind} {model}"
    return {"device": name, "dtype": device.dtype, "threads": device.threads, "torch": torch.__version__}


def batch_slices(rows: int, size: int) -> list[slice]:
    """The batches of so many rows, in order; the last one may be smaller."""
    return [slice(start, start + size) for start in range(0, rows, size)]


class NetworkStage(ABC, Generic[Rows, StageSettings]):
    """Base of the stages that run a model on all rows of a unit; each lives in an actor.

    Args:
        model: a source that `snapfusion.models.load` accepts.
        settings: of the stage.
        device: of the model.
    """

    def __init__(self, *, model: str, settings: StageSettings, device: Device) -> None:
        self.worker = uuid.uuid4().hex
        self.settings = settings
        self.torch_device = prepare(device)
        self.dtype = DTYPES[device.dtype]
        self.environment = environment_of(device)
        self.bundle = load(model, device=self.torch_device, dtype=self.dtype)

    @abstractmethod
    def columns(self, rows: Rows) -> tuple[dict[str, Any], list[bool]]:
        """The table's columns for all rows, and whether each row is finite.

        Batches must depend on the unit alone: recomputing it must give the same bits.
        """

    def __call__(self, rows: Rows) -> FinishedRows:
        """The finished unit; rows that are not finite are rejected."""
        began = time.monotonic()
        columns, finite = self.columns(rows)
        span = UnitSpan(self.worker, began, time.monotonic())
        return rows.finish(columns, finite=finite, environment=self.environment, span=span)
