"""Update rules of the training-free samplers. Notation as in `snapfusion.schedule`.

Every solver takes a DDIM step from an estimate and calls the network once per step. With
lambda = log(alpha / sigma), which rises by h in this step and rose by h_previous in the step before:

solver   the estimate of the step
ddim     x and eps at z_t
euler    the same; the step is written for z / alpha over sigma / alpha, which is equal to DDIM's
dpm      eps extrapolated to the middle of the step:   eps + h / (2 h_previous) (eps - eps_previous)
dpm++    x extrapolated to the middle of the step:     x + h / (2 h_previous) (x - x_previous)

"dpm" and "dpm++" are the second-order multistep solvers ("2M"). The DPM-Solver of the paper also has a
singlestep variant, which calls the network twice per step, at timesteps between those of the grid.
"""

from torch import Tensor

from snapfusion.schedule import Estimate, Schedule


def ddim_step(estimate: Estimate, *, t_next: Tensor, schedule: Schedule) -> Tensor:
    """z_t' = alpha_t' x + sigma_t' eps, [B,4,h,w] float32. SnapFusion Eq. 2."""
    # diffusers steps to t' = t - T // N instead, which leaves the grid if N does not divide T.
    return schedule.diffuse(x=estimate.x, eps=estimate.eps, t=t_next)


def euler_step(estimate: Estimate, *, z_t: Tensor, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """z' / alpha' = z / alpha + (sigma' / alpha' - sigma / alpha) eps (Karras et al. 2022).

    Equal to `ddim_step` up to rounding. [B,4,h,w] float32.
    """
    noise, noise_next = (schedule.sigma(time) / schedule.alpha(time) for time in (t, t_next))
    return schedule.alpha(t_next) * (z_t / schedule.alpha(t) + (noise_next - noise) * estimate.eps)


def extrapolate_eps(
    current: Estimate, previous: Estimate, *, factor: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule
) -> Estimate:
    """eps + factor (eps - eps_previous), and x of z_t with that eps: DPM-Solver (Lu et al. 2022).

    Args:
        current: the network's estimate at z_t.
        previous: its estimate one step earlier.
        factor: h / (2 h_previous), [B,1,1,1] float32, of `extrapolation_factor`.
        z_t: [B,4,h,w] float32 at t.
        t: [B] int64.
        schedule: gives alpha_t and sigma_t.
    """
    return schedule.from_eps(eps=current.eps + factor * (current.eps - previous.eps), z_t=z_t, t=t)


def extrapolate_x(
    current: Estimate, previous: Estimate, *, factor: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule
) -> Estimate:
    """x + factor (x - x_previous), and eps of z_t with that x: DPM-Solver++(2M) (Lu et al. 2022).

    Args as of `extrapolate_eps`.
    """
    x = current.x + factor * (current.x - previous.x)
    return Estimate(x=x, eps=(z_t - schedule.alpha(t) * x) / schedule.sigma(t))


def extrapolation_factor(*, t_previous: Tensor, t: Tensor, t_next: Tensor, schedule: Schedule) -> Tensor:
    """h / (2 h_previous) as [B,1,1,1] float32, with lambda = log(SNR) / 2 (Lu et al. 2022)."""
    before, now, after = (schedule.snr(time).log() for time in (t_previous, t, t_next))
    return (after - now) / (2.0 * (now - before))
