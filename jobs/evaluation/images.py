"""Generates images of captions with a Stable Diffusion, and saves them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from jobs.runtime.logs import logger
from snapfusion.mini.captions import caption_warning
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.tokenizer import truncation_warning
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid
from snapfusion.solver_names import Solver

_DEFAULT_STEPS = 50
_DISTILLED_SOLVER = "ddim"
"""Step distillation is of DDIM steps (SnapFusion Sec. 4.2)."""

_MIN_DISPLAY_SIDE = 256
_SINGLE_THREAD_MAX_SIDE = 64
"""Up to this many pixels a side, synchronisation of threads costs more than they save."""


def warn_of_caption(tokenizer: CLIPTokenizer, caption: str) -> None:
    """Say if a model reads only a part of a caption, or is a miniature that does not know it."""
    for warning in (
        truncation_warning(tokenizer, caption),
        caption_warning(caption, vocabulary_size=len(tokenizer)),
    ):
        if warning is not None:
            logger.warning(warning)


class NonFiniteImageError(ArithmeticError):
    """An image with NaN or infinite values, which would be saved as black."""

    def __init__(self) -> None:
        super().__init__(
            "an image has values that are NaN or infinite; try a lower --guidance or another model"
        )


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
    """Generate `count` images of each caption, uint8 [H,W,3], by `solver` at guidance w (Eq. 3).

    The noise of an image depends on the seed, its caption, and its index among the caption's images.

    Raises:
        NonFiniteImageError: if an image has values that are NaN or infinite.
    """
    if bundle.device.type == "cpu" and bundle.image_size <= _SINGLE_THREAD_MAX_SIDE:
        torch.set_num_threads(1)
    # Not of the batch: an image is the same whatever else is generated beside it.
    keys = [noise_key(seed, caption, index) for caption in captions for index in range(count)]
    c = bundle.encode_text(bundle.tokenize([caption for caption in captions for _ in range(count)]))
    z_t = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
    grid = time_grid(steps, schedule_steps=bundle.schedule.num_steps)
    denoiser = bundle.denoiser(c, w=guidance)
    latents = sample(denoiser, z_t, solver=solver, grid=grid, schedule=bundle.schedule)
    images = bundle.decode(latents)
    if not images.isfinite().all():
        raise NonFiniteImageError
    return list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())


def distilled_steps(bundle: Bundle) -> int:
    """Steps that a model was distilled for; 50 for one that was not."""
    return int(bundle.distillation["steps"]) if bundle.distillation else _DEFAULT_STEPS


def distillation_mismatch(bundle: Bundle, *, steps: int, solver: Solver, guidance: float) -> str | None:
    """One line about how a sampler departs from what a model was distilled for; None if it does not."""
    if bundle.distillation is None:
        return None
    cfg_range = bundle.distillation.get("cfg_range")
    in_range = cfg_range is None or cfg_range["low"] <= guidance <= cfg_range["high"]
    if steps == distilled_steps(bundle) and solver == _DISTILLED_SOLVER and in_range:
        return None
    scales = f" at guidance {cfg_range['low']:g} to {cfg_range['high']:g}" if cfg_range else ""
    return (
        f"distilled for {distilled_steps(bundle)} steps of {_DISTILLED_SOLVER}{scales}; "
        f"this is {steps} of {solver} at guidance {guidance:g}"
    )


def save_images(images: Sequence[np.ndarray], path: Path) -> int:
    """Save images side by side as PNG, small ones enlarged; returns the factor."""
    row = np.concatenate(images, axis=1)
    factor = max(1, _MIN_DISPLAY_SIDE // row.shape[0])
    enlarged = row.repeat(factor, axis=0).repeat(factor, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(enlarged).save(path, format="PNG")
    return factor
