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
