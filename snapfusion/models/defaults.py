"""How a model is sampled: its number of steps, sampler and guidance if none are given, and its timesteps."""

from collections.abc import Mapping
from typing import Any

from snapfusion.models.bundle import Bundle
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.tokenizer import CLIP_VOCABULARY
from snapfusion.sampling import consistency_grid, time_grid
from snapfusion.solver_names import CONSISTENCY, Solver

_STEPS = 50
_GUIDANCE, _MINIATURE_GUIDANCE = 7.5, 2.5


def distilled_steps(bundle: Bundle) -> int:
    """Steps that a model was distilled for; 50 for one that was not."""
    return int(bundle.distillation["steps"]) if bundle.distillation else _STEPS


def distilled_solver(bundle: Bundle) -> Solver:
    """Sampler that a model was distilled for; "ddim" for one that was not."""
    solver: Solver = (bundle.distillation or {}).get("sampler", "ddim")
    return solver


def has_folded_guidance(bundle: Bundle) -> bool:
    """Whether a student was distilled to be used at w = 1: its teacher's guidance is in its weights."""
    cfg_range = (bundle.distillation or {}).get("cfg_range")
    return cfg_range is not None and cfg_range["high"] == 1.0


def needs_one_pass(bundle: Bundle) -> bool:
    """Whether a step takes one pass of the UNet: w is its input, or it was distilled to be used at w = 1."""
    return has_guidance_embedding(bundle.unet) or has_folded_guidance(bundle)


def sampling_grid(bundle: Bundle, *, steps: int, solver: Solver) -> tuple[int, ...]:
    """Timesteps of so many steps, and -1: of `consistency_grid` if a student is sampled as it was distilled.

    Raises:
        ValueError: if it has fewer points than steps.
    """
    points = (bundle.distillation or {}).get("points") if solver == CONSISTENCY else None
    return _grid(steps, points=points, num_steps=bundle.schedule.num_steps)


def distilled_grid(record: Mapping[str, Any], *, num_steps: int) -> tuple[int, ...]:
    """Timesteps that a student is sampled at, and -1, by the record of its distillation.

    Args:
        record: as `Bundle.distillation`.
        num_steps: timesteps of the schedule.
    """
    points = record.get("points") if record.get("sampler") == CONSISTENCY else None
    return _grid(record["steps"], points=points, num_steps=num_steps)


def _grid(steps: int, *, points: int | None, num_steps: int) -> tuple[int, ...]:
    if points is None:
        return time_grid(steps, schedule_steps=num_steps)
    return consistency_grid(steps, points=points, schedule_steps=num_steps)


def default_guidance(bundle: Bundle) -> float:
    """Guidance w for a model: 2.5 for a miniature, else 7.5, within what a student was distilled for."""
    miniature = bundle.tokenizer.vocab_size != CLIP_VOCABULARY
    w = _MINIATURE_GUIDANCE if miniature else _GUIDANCE
    cfg_range = (bundle.distillation or {}).get("cfg_range")
    return min(max(w, cfg_range["low"]), cfg_range["high"]) if cfg_range else w
