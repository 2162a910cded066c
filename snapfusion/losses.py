"""The losses of the paper, one value a sample. Letters as in `snapfusion.schedule`."""

from __future__ import annotations

from torch import Tensor

from snapfusion.schedule import Schedule


def velocity_loss(v_hat: Tensor, *, x: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_ori: the squared error of the predicted velocity, a mean over its elements. SnapFusion Eq. 6.

    Args:
        v_hat: the network's velocity at z_t = alpha_t x + sigma_t eps, [B,4,h,w].
        x: clean latent [B,4,h,w] float32.
        eps: noise [B,4,h,w] float32.
        t: [B] int64.
        schedule: of alpha_t and sigma_t.

    Returns:
        [B] float32, not negative.
    """
    v = schedule.velocity(x=x, eps=eps, t=t)
    return (v_hat.float() - v).square().mean(dim=(1, 2, 3))


def distillation_weight(t: Tensor, *, schedule: Schedule) -> Tensor:
    """max(alpha_t^2 / sigma_t^2, 1) as [B] float32, for t [B] int64 in 0 .. T-1. SnapFusion Eq. 9.

    A floor: where there is more noise than signal the error in x counts as it is, elsewhere as that in eps.
    """
    return schedule.snr(t).clamp(min=1.0).flatten()


def distillation_loss(x_hat: Tensor, *, x_target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_dstl: the weighted squared error of the student's x, a mean over its elements. SnapFusion Eq. 9, 16.

    L_vani_dstl where student and teacher are not guided, L_cfg_dstl where both are (Eq. 10).

    Args:
        x_hat: the student's x at z_t, [B,4,h,w].
        x_target: the x that lands where the teacher landed, [B,4,h,w].
        t: [B] int64 in 0 .. T-1.
        schedule: of alpha_t and sigma_t.

    Returns:
        [B] float32, not negative.
    """
    error = (x_hat.float() - x_target.float()).square().mean(dim=(1, 2, 3))
    return distillation_weight(t, schedule=schedule) * error


def combined_loss(*, distillation: Tensor, original: Tensor, gamma: float) -> Tensor:
    """L = L_dstl + gamma L_ori, [B] float32 of two such. SnapFusion Eq. 11."""
    return distillation + gamma * original
