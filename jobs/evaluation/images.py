"""Generates images of captions with a Stable Diffusion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPTokenizer

from snapfusion.mini.captions import caption_warning
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.defaults import distilled_solver, distilled_steps, sampling_grid
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.tokenizer import truncation_warning
from snapfusion.noise import gaussian_batch, noise_key, step_noise
from snapfusion.sampling import trajectory
from snapfusion.solver_names import CONSISTENCY, Solver

_SINGLE_THREAD_MAX_SIDE = 64
"""Up to this many pixels a side, synchronisation of threads costs more than they save."""
OnStep = Callable[[int], None]
"""(k) -> None: called after each step of a sampler, the k-th, from 1."""


def caption_warnings(tokenizer: CLIPTokenizer, caption: str) -> list[str]:
    """Lines that say if a model reads only a part of a caption, or is a miniature that does not know it."""
    warnings = (
        truncation_warning(tokenizer, caption),
        caption_warning(caption, vocabulary_size=tokenizer.vocab_size),
    )
    return [warning for warning in warnings if warning is not None]


@dataclass(frozen=True, kw_only=True)
class StartImage:
    """An image to begin with: noise is added to it, and only the last steps are taken.

    Attributes:
        pixels: uint8 [H,W,3] of the model's size.
        strength: part of the steps that is taken, above 0 and at most 1.
    """

    pixels: np.ndarray
    strength: float

    def steps_of(self, steps: int) -> int:
        """Number of steps to take, of so many; at least one."""
        return max(1, round(steps * self.strength))


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
    negative: str = "",
    start: StartImage | None = None,
    on_step: OnStep | None = None,
) -> list[np.ndarray]:
    """Generate `count` images of each caption, uint8 [H,W,3], by `solver` at guidance w (Eq. 3).

    The noise of an image depends on the seed, its caption, and its index among the caption's images.

    Args:
        bundle: the model.
        captions: to generate from.
        steps: of the time grid; with a start image only the last of them are taken.
        guidance: w.
        seed: of the noise.
        count: images of each caption.
        solver: one of `SOLVERS`.
        negative: caption of the unconditional input; "" as in the paper.
        start: an image to begin with in place of noise.
        on_step: called after each step.

    Raises:
        NonFiniteImageError: if an image has values that are NaN or infinite.
    """
    if bundle.device.type == "cpu" and bundle.image_size <= _SINGLE_THREAD_MAX_SIDE:
        torch.set_num_threads(1)
    # Not of the batch: an image is the same whatever else is generated beside it.
    keys = [noise_key(seed, caption, index) for caption in captions for index in range(count)]
    c = bundle.encode_text(bundle.tokenize([caption for caption in captions for _ in range(count)]))
    z_t = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
    grid = sampling_grid(bundle, steps=steps, solver=solver)
    if start is not None:
        grid = grid[-1 - start.steps_of(steps) :]
        t = torch.full((len(z_t),), grid[0], dtype=torch.int64, device=bundle.device)
        latents = bundle.encode_images(torch.from_numpy(start.pixels).permute(2, 0, 1)[None])
        z_t = bundle.schedule.diffuse(x=latents.expand_as(z_t), eps=z_t, t=t)
    denoiser = bundle.denoiser(c, w=guidance, c_null=bundle.encode_text(bundle.tokenize([negative])))
    noise = step_noise(keys, bundle.latent_shape, device=bundle.device)
    steps_taken = trajectory(denoiser, z_t, solver=solver, grid=grid, schedule=bundle.schedule, noise=noise)
    for step, (_, z_next, _) in enumerate(steps_taken, start=1):
        z_t = z_next
        if on_step is not None:
            on_step(step)
    images = bundle.decode(z_t)
    if not images.isfinite().all():
        raise NonFiniteImageError
    return list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())


def has_unconditional_input(bundle: Bundle, *, guidance: float) -> bool:
    """Tell whether guidance runs the UNet without the caption, too: not at w = 1, nor if w is its input."""
    return guidance != 1.0 and not has_guidance_embedding(bundle.unet)


def distillation_mismatch(bundle: Bundle, *, steps: int, solver: Solver, guidance: float) -> str | None:
    """One line about how a sampler departs from what a model was distilled for; None if it does not."""
    if bundle.distillation is None:
        return None
    cfg_range = bundle.distillation.get("cfg_range")
    in_range = cfg_range is None or cfg_range["low"] <= guidance <= cfg_range["high"]
    # A consistency model estimates the end from any time, so it has no number of steps of its own.
    any_steps = solver == CONSISTENCY and bundle.distillation.get("method") == "lcm"
    in_steps = steps == distilled_steps(bundle) or any_steps
    if in_steps and solver == distilled_solver(bundle) and in_range:
        return None
    scales = f" at guidance {cfg_range['low']:g} to {cfg_range['high']:g}" if cfg_range else ""
    return (
        f"distilled for {distilled_steps(bundle)} steps of {distilled_solver(bundle)}{scales}; "
        f"this is {steps} of {solver} at guidance {guidance:g}"
    )
