"""The record of a step distillation, which says how a model is sampled: of a folder, or of a LoRA."""

from collections.abc import Mapping
from typing import Any

from snapfusion.models.defaults import distilled_grid
from snapfusion.models.errors import ModelError
from snapfusion.schedule import Schedule

DISTILLATION_FILE = "distillation.json"
"""Describes the step distillation of a model, and so how to sample it."""
DISTILLATION_METADATA = "distillation"
"""Key of the same record in the header of a LoRA's safetensors file, as JSON."""


def check_distillation(record: Mapping[str, Any], *, schedule: Schedule, where: str) -> dict[str, Any]:
    """Return a record whose number of steps, and timesteps if it states them, are possible.

    Raises:
        ModelError: if they are not.
    """
    steps = record.get("steps")
    if not isinstance(steps, int) or not 1 <= steps <= schedule.num_steps:
        raise ModelError(
            f"{where} says it was distilled for {steps!r} steps; a number from 1 to {schedule.num_steps} is "
            "accepted"
        )
    expected = distilled_grid(record, num_steps=schedule.num_steps)[:-1]
    if (found := record.get("timesteps", list(expected))) != list(expected):
        raise ModelError(
            f"{where} gives the timesteps {found}, and its {steps} steps are sampled at {list(expected)}: no "
            "other grid is supported"
        )
    return dict(record)
