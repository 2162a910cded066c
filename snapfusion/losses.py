"""Losses of the paper, one value per sample. Notation as in `snapfusion.schedule`."""

from torch import Tensor

from snapfusion.schedule import Schedule


def velocity_loss(v_hat: Tensor, *, x: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_ori: mean squared error of the predicted velocity. SnapFusion Eq. 6.

    Args:
        v_hat: the network's velocity at z_t = alpha_t x + sigma_t eps, [B,4,h,w].
        x: clean latent [B,4,h,w] float32.
        eps: noise [B,4,h,w] float32.
        t: [B] int64.
        schedule: gives alpha_t and sigma_t.

    Returns:
        [B] float32, non-negative.
    """
    v = schedule.velocity(x=x, eps=eps, t=t)
    return (v_hat.float() - v).square().mean(dim=(1, 2, 3))


def distillation_weight(t: Tensor, *, schedule: Schedule) -> Tensor:
    """max(alpha_t^2 / sigma_t^2, 1) as [B] float32, for t [B] int64 in 0 .. T-1. SnapFusion Eq. 9.

    The loss is then the larger of the squared errors in x and in eps.
    """
    return schedule.snr(t).clamp(min=1.0).flatten()


def distillation_loss(x_hat: Tensor, *, x_target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """L_dstl: weighted mean squared error of the student's x. SnapFusion Eq. 9, 16.

    L_vani_dstl if student and teacher are unguided, L_cfg_dstl if both are guided (Eq. 10).

    Args:
        x_hat: the student's x at z_t, [B,4,h,w].
        x_target: the x that takes the student to the teacher's endpoint, [B,4,h,w].
        t: [B] int64 in 0 .. T-1.
        schedule: gives alpha_t and sigma_t.

    Returns:
        [B] float32, non-negative.
    """
    error = (x_hat.float() - x_target.float()).square().mean(dim=(1, 2, 3))
    return distillation_weight(t, schedule=schedule) * error


def combined_loss(*, distillation: Tensor, original: Tensor, gamma: float) -> Tensor:
    """L = L_dstl + gamma L_ori; all are [B] float32. SnapFusion Eq. 11."""
    return distillation + gamma * original


def pseudo_huber_loss(estimate: Tensor, target: Tensor, *, c: float) -> Tensor:
    """Mean of sqrt((estimate - target)^2 + c^2) - c over the elements of each row.

    d of Eq. 16 of (Luo et al. 2023) and of Eq. 5 of (Wang et al. 2024), as their scripts have it.

    Args:
        estimate: [B,4,h,w].
        target: [B,4,h,w], without a gradient.
        c: where it turns from a square into an absolute value, above 0.

    Returns:
        [B] float32, non-negative.
    """
    square = (estimate.float() - target.float()).square()
    return ((square + c**2).sqrt() - c).mean(dim=(1, 2, 3))
