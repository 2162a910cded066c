"""Gaussian noise keyed by row, independent of rank, batch, worker and device.

NumPy guarantees the raw bit stream of its Philox generator (Salmon et al. 2011) across versions and machines.
The inverse normal CDF maps these bits to unit Gaussians in float64. The normal samplers of NumPy and torch
give no such guarantee.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def noise_key(*parts: str | int) -> int:
    """Hash the identity of a row, for example (seed, row id, draw), to a 63-bit key.

    63 bits fit the signed 64-bit integers of Delta tables. Parts are hashed as JSON, so ("a", "b") and
    ("a,b",) cannot collide.

    Raises:
        ValueError: if no part is given.
        TypeError: for a NumPy integer, which JSON does not serialize.
    """
    if not parts:
        raise ValueError("a noise key needs at least one part")
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(key: int, count: int) -> np.ndarray:
    """Draw `count` numbers from the open interval (0, 1): float64 [count], the same on every machine."""
    bits = np.random.Philox(key=key).random_raw(count)
    # 53 bits fill the mantissa of a float64; the half keeps 0 and 1 out, whose Gaussians are infinite.
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gaussian(key: int, shape: Sequence[int]) -> Tensor:
    """Draw unit Gaussian noise for one row: float32 of `shape`, on the CPU."""
    draws = torch.special.ndtri(torch.from_numpy(uniform(key, math.prod(shape))))
    return draws.to(torch.float32).reshape(tuple(shape))


StepNoise = Callable[[int], Tensor]
"""(t) -> fresh unit Gaussian noise at a timestep, float32 [B,4,h,w]."""


def gaussian_batch(keys: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw eps for a batch: float32 [len(keys), *shape], on the CPU, row i from keys[i] alone."""
    return torch.stack([gaussian(key, shape) for key in keys])


def step_noise(keys: Sequence[int], shape: Sequence[int], *, device: torch.device) -> StepNoise:
    """Return the noise that a sampler adds at a timestep: row i from keys[i] and t alone, on `device`."""

    def noise(t: int) -> Tensor:
        return gaussian_batch([noise_key("step", key, t) for key in keys], shape).to(device)

    return noise
