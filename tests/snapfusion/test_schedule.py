"""The schedule and the conversions between x, eps and v, against float64 formulas in NumPy."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusion_oracles import SCHEDULE, alpha_sigma
from diffusion_oracles import randn as randn_of

from snapfusion.schedule import Schedule

TIMES = [-1, 0, 1, 61, 124, 499, 874, 998, 999]


def randn(seed, *, rows=9):
    return randn_of(seed, (rows, 4, 8, 8))


def columns(times):
    """t as int64 [B], and the oracle's alpha_t and sigma_t as float64 [B,1,1,1]."""
    alpha, sigma = np.array([alpha_sigma(t) for t in times]).T.reshape(2, -1, 1, 1, 1)
    return torch.tensor(times), alpha, sigma


def test_alpha_and_sigma_match_the_oracle():
    t, alpha, sigma = columns(list(range(-1, 1000)))
    np.testing.assert_allclose(SCHEDULE.alpha(t).numpy(), alpha, rtol=1e-7)
    np.testing.assert_allclose(SCHEDULE.sigma(t).numpy(), sigma, rtol=1e-7)
    np.testing.assert_allclose(SCHEDULE.snr(t[1:]).numpy(), (alpha[1:] / sigma[1:]) ** 2, rtol=1e-6)


def test_alphas_match_diffusers():
    library = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alpha = SCHEDULE.alpha(torch.arange(1000)).double().flatten()
    np.testing.assert_allclose(alpha.square().numpy(), library.alphas_cumprod.double().numpy(), rtol=1e-6)


def test_clean_end_is_exact():
    clean = torch.tensor([-1])
    assert SCHEDULE.alpha(clean).item() == 1.0
    assert SCHEDULE.sigma(clean).item() == 0.0
    assert SCHEDULE.snr(clean).item() == float("inf")
    x = randn(0, rows=1)
    assert torch.equal(SCHEDULE.diffuse(x=x, eps=randn(1, rows=1), t=clean), x)


def test_process_preserves_variance_and_loses_signal():
    t = torch.arange(-1, 1000)
    alpha, sigma = SCHEDULE.alpha(t).double().flatten(), SCHEDULE.sigma(t).double().flatten()
    np.testing.assert_allclose((alpha**2 + sigma**2).numpy(), 1.0, rtol=1e-6)
    assert (alpha.diff() < 0).all()
    assert alpha[-1].item() == pytest.approx(0.0682649, rel=1e-5)


def test_z_t_and_v_match_the_oracle():
    t, alpha, sigma = columns(TIMES)
    x, eps = randn(0), randn(1)
    np.testing.assert_allclose(
        SCHEDULE.diffuse(x=x, eps=eps, t=t).numpy(), alpha * x.numpy() + sigma * eps.numpy(), atol=1e-6
    )
    np.testing.assert_allclose(
        SCHEDULE.velocity(x=x, eps=eps, t=t).numpy(), alpha * eps.numpy() - sigma * x.numpy(), atol=1e-6
    )


def test_estimates_match_the_oracle():
    t, alpha, sigma = columns(TIMES)
    z_t, output = randn(2), randn(3)
    z, out = z_t.double().numpy(), output.double().numpy()
    from_eps = SCHEDULE.from_eps(eps=output, z_t=z_t, t=t)
    # 1 / alpha_999 is 14.6, and scales the rounding of the float32 numerator with it.
    assert np.all(np.abs(from_eps.x.numpy() - (z - sigma * out) / alpha) < 2e-6 / alpha)
    assert torch.equal(from_eps.eps, output)
    from_v = SCHEDULE.from_v(v=output, z_t=z_t, t=t)
    np.testing.assert_allclose(from_v.x.numpy(), alpha * z - sigma * out, atol=2e-6)
    np.testing.assert_allclose(from_v.eps.numpy(), sigma * z + alpha * out, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_true_output_gives_x_and_eps(prediction_type):
    t, alpha, _ = columns(TIMES)
    x, eps = randn(0), randn(1)
    z_t = SCHEDULE.diffuse(x=x, eps=eps, t=t)
    output = eps if prediction_type == "epsilon" else SCHEDULE.velocity(x=x, eps=eps, t=t)
    estimate = SCHEDULE.estimate(output, z_t=z_t, t=t, prediction_type=prediction_type)
    assert torch.all((estimate.x - x).abs() < 2e-6 / torch.from_numpy(alpha))
    np.testing.assert_allclose(estimate.eps.numpy(), eps.numpy(), atol=2e-6)


def test_half_precision_output_is_converted_in_float32():
    t, _, _ = columns(TIMES)
    z_t, output = randn(2), randn(3).bfloat16()
    estimate = SCHEDULE.estimate(output, z_t=z_t, t=t, prediction_type="v_prediction")
    in_full = SCHEDULE.from_v(v=output.float(), z_t=z_t, t=t)
    assert estimate.x.dtype == torch.float32
    assert torch.equal(estimate.x, in_full.x)


def test_unknown_prediction_type_fails():
    with pytest.raises(ValueError, match=r"prediction_type is 'sample'; epsilon or v_prediction"):
        SCHEDULE.estimate(randn(0), z_t=randn(1), t=torch.tensor(TIMES), prediction_type="sample")


@pytest.mark.parametrize("t", [-2, 1000])
def test_timestep_outside_the_schedule_fails(t):
    with pytest.raises(ValueError, match=r"-1 \.\. 999 is accepted"):
        SCHEDULE.alpha(torch.tensor([0, t]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 0),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("beta_start", 0.02),
        ("beta_start", math.nan),
    ],
)
def test_invalid_betas_fail(name, value):
    with pytest.raises(ValueError, match=name):
        Schedule(**{name: value})


def test_schedules_are_equal_by_value():
    assert Schedule() == Schedule(beta_end=0.012)
    assert Schedule() != Schedule(beta_end=0.02)


def test_schedule_ignores_the_default_device():
    with torch.device("meta"):
        on_meta = Schedule()
    t = torch.tensor([-1, 0, 999])
    assert torch.equal(on_meta.alpha(t), SCHEDULE.alpha(t))
    assert torch.equal(on_meta.sigma(t), SCHEDULE.sigma(t))
