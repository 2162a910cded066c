"""Batches of pairs for trainings of toy decoders."""

import torch

from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.training.batch import Batch


def pairs_of(step: int, *, rows: slice = slice(8)) -> Batch:
    """These rows of a step's eight: random latents, and images that depend on them."""
    ids = tuple(f"{step}-{row}" for row in range(8))[rows]
    latent = gaussian_batch([noise_key(row) for row in ids], (4, 6, 6))
    image = (127.5 + 40.0 * latent[:, :3]).clamp(0, 255).to(torch.uint8)
    return Batch(ids=ids, columns={"latent": latent, "image": image})
