"""Noise that is a function of a row's key: never of rank, batch, worker or device.

A Philox counter generator (Salmon et al. 2011) gives raw bits, whose stream NumPy guarantees for ever; the
inverse normal distribution function turns them into unit Gaussians in float64. NumPy's and torch's own
normal samplers promise neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def noise_key(*parts: str | int) -> int:
    """A 63-bit key from what identifies a row, for example (seed, row id, draw).

    63 bits, because Delta tables hold signed 64-bit integers. Different parts are different JSON texts, so
    no id can be made to look like two parts.

    Raises:
        ValueError: if no part is given.
        TypeError: for a NumPy integer, which would print differently from the int that equals it.
    """
    if not parts:
        raise ValueError("a noise key needs at least one part")
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(key: int, count: int) -> np.ndarray:
    """`count` numbers in the open interval (0, 1), float64 [count], the same on every machine."""
    bits = np.random.Philox(key=key).random_raw(count)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gaussian(key: int, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise of one row: float32 tensor of `shape` on the CPU."""
    count = int(np.prod(shape))
    draws = torch.special.ndtri(torch.from_numpy(uniform(key, count)))
    return draws.to(torch.float32).reshape(tuple(shape))


def gaussian_batch(keys: Sequence[int], shape: Sequence[int]) -> Tensor:
    """eps for a batch: float32 [len(keys), *shape] on the CPU, row i from keys[i] alone."""
    return torch.stack([gaussian(key, shape) for key in keys])
