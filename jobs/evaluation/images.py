"""Captions to pictures, and pictures to a file, by a Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid
from snapfusion.solver_names import Solver

_DEFAULT_STEPS = 50
_DISTILLED_SOLVER = "ddim"
"""Step distillation is of DDIM steps (SnapFusion Sec. 4.2)."""

_MIN_DISPLAY_SIDE = 256
_SINGLE_THREAD_MAX_SIDE = 64
"""Up to this many pixels a side, threads cost more in waiting for each other than they save."""


@torch.inference_mode()
def generate_images(
    bundle: Bundle,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    count: int,
    solver: Solver = "ddim",
) -> list[np.ndarray]:
    """`count` pictures of each caption, uint8 [H,W,3], after steps of `solver` at guidance w (Eq. 3).

    The noise of a picture follows from the seed, its caption, and its number among the caption's.
    """
    if bundle.device.type == "cpu" and bundle.image_size <= _SINGLE_THREAD_MAX_SIDE:
        torch.set_num_threads(1)
    asked = [(caption, number) for caption in captions for number in range(count)]
    keys = [noise_key(seed, caption, number) for caption, number in asked]
    c = bundle.encode_text(bundle.tokenize([caption for caption, _ in asked]))
    z_t = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
    grid = time_grid(steps, schedule_steps=bundle.schedule.num_steps)
    denoiser = bundle.denoiser(c, w=guidance)
    latents = sample(denoiser, z_t, solver=solver, grid=grid, schedule=bundle.schedule)
    return list(to_uint8(bundle.decode(latents)).permute(0, 2, 3, 1).cpu().numpy())


def distilled_steps(bundle: Bundle) -> int:
    """The steps that a model was distilled for; 50 for one that was not."""
    return int(bundle.distillation["steps"]) if bundle.distillation else _DEFAULT_STEPS


def distillation_mismatch(bundle: Bundle, *, steps: int, solver: Solver, guidance: float) -> str | None:
    """In a line, what a model was distilled for, if that is not what is asked of it; else None."""
    if bundle.distillation is None:
        return None
    learnt = bundle.distillation.get("cfg_range")
    as_learnt = learnt is None or learnt["low"] <= guidance <= learnt["high"]
    if steps == distilled_steps(bundle) and solver == _DISTILLED_SOLVER and as_learnt:
        return None
    scales = f" at guidance {learnt['low']:g} to {learnt['high']:g}" if learnt else ""
    return (
        f"distilled for {distilled_steps(bundle)} steps of {_DISTILLED_SOLVER}{scales}; "
        f"this is {steps} of {solver} at guidance {guidance:g}"
    )


def save_images(pictures: Sequence[np.ndarray], place: Path) -> int:
    """Write pictures side by side as PNG; returns by how much small ones were enlarged to be seen."""
    row = np.concatenate(pictures, axis=1)
    factor = max(1, _MIN_DISPLAY_SIDE // row.shape[0])
    enlarged = row.repeat(factor, axis=0).repeat(factor, axis=1)
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(enlarged).save(place, format="PNG")
    return factor
