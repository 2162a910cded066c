"""Stand-in networks, random tensors and float64 oracles of the diffusion process."""

from itertools import pairwise

import numpy as np
import torch

from snapfusion.schedule import Schedule

SCHEDULE = Schedule()
SHAPE = (2, 4, 8, 8)
ALPHA_BAR = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alpha_sigma(t):
    """alpha and sigma of SD-v1.5 at one timestep, in float64."""
    return (ALPHA_BAR[t] ** 0.5, (1.0 - ALPHA_BAR[t]) ** 0.5) if t >= 0 else (1.0, 0.0)


def network(z_t, t, caption=0.0):
    """A stand-in for a network, in torch or NumPy, in which no terms cancel."""
    values = z_t * 0.9 + (t.reshape(-1, 1, 1, 1) + 1) / 1000 + caption
    return 0.8 * (values.tanh() if isinstance(z_t, torch.Tensor) else np.tanh(values))


def denoiser(prediction_type, output=network):
    def estimate(z_t, t):
        return SCHEDULE.estimate(output(z_t, t), z_t=z_t, t=t, prediction_type=prediction_type)

    return estimate


def ddim_latents(z, *, grid, prediction_type, output=network):
    """Eq. 2 over `grid` in float64 NumPy: yields each latent after the first."""
    z = z.double().numpy()
    for t, t_next in pairwise(grid):
        (a, s), (a_next, s_next) = alpha_sigma(t), alpha_sigma(t_next)
        out = output(z, np.full(len(z), t, dtype=np.float64))
        x, eps = (
            ((z - s * out) / a, out) if prediction_type == "epsilon" else (a * z - s * out, s * z + a * out)
        )
        z = a_next * x + s_next * eps
        yield z
