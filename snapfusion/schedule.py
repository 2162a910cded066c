"""The noise schedule, and conversions between x, eps and v.

symbol    meaning                                             shape        dtype
t         timestep, -1 (clean) .. T-1 (noisiest)              [B]          int64
x         clean latent                                        [B,4,h,w]    float32
eps       unit Gaussian noise                                 [B,4,h,w]    float32
z_t       alpha_t x + sigma_t eps                             [B,4,h,w]    float32
v         alpha_t eps - sigma_t x, the velocity               [B,4,h,w]    float32
alpha_t   strength of the signal, alpha_t^2 + sigma_t^2 = 1   [B,1,1,1]    float32
sigma_t   strength of the noise                               [B,1,1,1]    float32

t = -1 is the clean end: alpha = 1 and sigma = 0 exactly. All tables are computed in float64.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snapfusion.prediction_types import PREDICTION_TYPES, PredictionType


class Estimate(NamedTuple):
    """A denoiser's estimate of the clean latent and the noise, each [B,4,h,w] float32. SnapFusion Eq. 2."""

    x: Tensor
    eps: Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """alpha_t and sigma_t of a variance-preserving process. SnapFusion Sec. 2.1; betas as in SD-v1.5.

    The betas are "scaled linear": their square roots are linearly spaced.

    Raises:
        ValueError: unless 0 < beta_start <= beta_end < 1 and num_steps >= 1.
    """

    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(f"0 < beta_start {self.beta_start} <= beta_end {self.beta_end} < 1 is needed")
        # Pinned to the CPU: a schedule needs values even under `torch.device("meta")`.
        exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_steps, **exact)
        alpha_bar = torch.cumprod(1.0 - roots**2, dim=0)
        clean = torch.ones(1, **exact)
        object.__setattr__(self, "_alphas", torch.cat([clean, alpha_bar.sqrt()]))
        object.__setattr__(self, "_sigmas", torch.cat([clean - 1.0, (1.0 - alpha_bar).sqrt()]))

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t as [B,1,1,1] float32 on t's device, for t [B] int64 in -1 .. T-1. SnapFusion Eq. 1."""
        return self._lookup("_alphas", t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t as [B,1,1,1] float32 on t's device, for t [B] int64 in -1 .. T-1. SnapFusion Eq. 1."""
        return self._lookup("_sigmas", t)

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2 as [B,1,1,1] float32; infinite at the clean end. SnapFusion Eq. 9."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def coefficients(self, t: int) -> tuple[float, float]:
        """alpha_t and sigma_t in float64, for one t in -1 .. T-1. SnapFusion Eq. 1."""
        if not -1 <= t < self.num_steps:
            raise ValueError(f"t is {t}; -1 .. {self.num_steps - 1} is accepted")
        tables: tuple[Tensor, Tensor] = (getattr(self, "_alphas"), getattr(self, "_sigmas"))  # noqa: B009
        return float(tables[0][t + 1]), float(tables[1][t + 1])

    def _lookup(self, table: str, t: Tensor) -> Tensor:
        # Checked on the CPU only: reading the values from an accelerator would synchronize at every step.
        if t.device.type == "cpu" and t.numel() and (int(t.min()) < -1 or int(t.max()) >= self.num_steps):
            raise ValueError(
                f"t spans {int(t.min())} .. {int(t.max())}; -1 .. {self.num_steps - 1} is accepted"
            )
        values: Tensor = getattr(self, table)  # index 0 is t = -1, the clean end
        # Not blocking: the host would wait for all that an accelerator has to do.
        on_device = values.to(device=t.device, dtype=torch.float32, non_blocking=True)
        return on_device[t + 1].view(-1, 1, 1, 1)

    def diffuse(self, *, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t x + sigma_t eps. SnapFusion Eq. 1; shapes as in the legend."""
        return self.alpha(t) * x + self.sigma(t) * eps

    def velocity(self, *, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = alpha_t eps - sigma_t x. SnapFusion Eq. 6; shapes as in the legend."""
        return self.alpha(t) * eps - self.sigma(t) * x

    def from_eps(self, *, eps: Tensor, z_t: Tensor, t: Tensor) -> Estimate:
        """x = (z_t - sigma_t eps) / alpha_t. SnapFusion Eq. 2; shapes as in the legend."""
        return Estimate(x=(z_t - self.sigma(t) * eps) / self.alpha(t), eps=eps)

    def from_v(self, *, v: Tensor, z_t: Tensor, t: Tensor) -> Estimate:
        """x = alpha_t z_t - sigma_t v and eps = sigma_t z_t + alpha_t v. SnapFusion Eq. 7, 8."""
        alpha_t, sigma_t = self.alpha(t), self.sigma(t)
        return Estimate(x=alpha_t * z_t - sigma_t * v, eps=sigma_t * z_t + alpha_t * v)

    def estimate(
        self, output: Tensor, *, z_t: Tensor, t: Tensor, prediction_type: PredictionType
    ) -> Estimate:
        """Convert a network output to x and eps, in float32. SnapFusion Eq. 2 for eps, Eq. 7 for v.

        Args:
            output: [B,4,h,w], eps or v according to `prediction_type`.
            z_t: [B,4,h,w] float32.
            t: [B] int64.
            prediction_type: "epsilon" or "v_prediction".

        Raises:
            ValueError: for any other prediction type.
        """
        output = output.float()
        if prediction_type == "epsilon":
            return self.from_eps(eps=output, z_t=z_t, t=t)
        if prediction_type == "v_prediction":
            return self.from_v(v=output, z_t=z_t, t=t)
        accepted = " or ".join(PREDICTION_TYPES)
        raise ValueError(f"prediction_type is {prediction_type!r}; {accepted} is accepted")
