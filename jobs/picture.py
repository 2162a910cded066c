"""One caption to a picture file, by a Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid

_SMALLEST_SIDE = 256
_TOO_SMALL_TO_SHARE = 64
"""Up to this many pixels a side, threads cost more in waiting for each other than they save."""


@torch.inference_mode()
def draw(
    bundle: Bundle, caption: str, *, steps: int, guidance: float, seed: int, count: int
) -> list[np.ndarray]:
    """`count` pictures of a caption, uint8 [H,W,3], after `steps` DDIM steps at guidance w (Eq. 3)."""
    if bundle.device.type == "cpu" and bundle.image_size <= _TOO_SMALL_TO_SHARE:
        torch.set_num_threads(1)
    keys = [noise_key(seed, caption, number) for number in range(count)]
    c = bundle.encode_text(bundle.tokenize([caption] * count))
    z_t = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
    grid = time_grid(steps, schedule_steps=bundle.schedule.num_steps)
    latents = sample(bundle.denoiser(c, w=guidance), z_t, grid=grid, schedule=bundle.schedule)
    return list(to_uint8(bundle.decode(latents)).permute(0, 2, 3, 1).cpu().numpy())


def save_pictures(pictures: Sequence[np.ndarray], place: Path) -> int:
    """Write pictures side by side as PNG; returns by how much small ones were enlarged to be seen."""
    row = np.concatenate(pictures, axis=1)
    factor = max(1, _SMALLEST_SIDE // row.shape[0])
    enlarged = row.repeat(factor, axis=0).repeat(factor, axis=1)
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(enlarged).save(place, format="PNG")
    return factor
