"""The schedule and the algebra of x, eps and v, against float64 formulas written independently in NumPy."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from snapfusion.schedule import Schedule

TIMES = [-1, 0, 1, 61, 124, 499, 874, 998, 999]


def oracle_tables() -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of SD-v1.5 at t = -1 .. 999, float64 [1001]."""
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


def drawn(seed: int, *, rows: int = len(TIMES)) -> torch.Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def columns(times: list[int]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """t as int64 [B], and the oracle's alpha_t and sigma_t as float64 [B,1,1,1]."""
    alphas, sigmas = oracle_tables()
    index = np.array(times) + 1
    return torch.tensor(times), alphas[index].reshape(-1, 1, 1, 1), sigmas[index].reshape(-1, 1, 1, 1)


def test_alpha_and_sigma_are_the_oracles_at_every_time():
    t, alpha, sigma = columns(list(range(-1, 1000)))
    schedule = Schedule()
    np.testing.assert_allclose(schedule.alpha(t).numpy(), alpha, rtol=1e-7)
    np.testing.assert_allclose(schedule.sigma(t).numpy(), sigma, rtol=1e-7)
    np.testing.assert_allclose(schedule.snr(t[1:]).numpy(), (alpha[1:] / sigma[1:]) ** 2, rtol=1e-6)


def test_alphas_are_the_librarys():
    library = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alpha = Schedule().alpha(torch.arange(1000)).double().flatten()
    np.testing.assert_allclose(alpha.square().numpy(), library.alphas_cumprod.double().numpy(), rtol=1e-6)


def test_the_clean_end_is_exact():
    clean = torch.tensor([-1])
    schedule = Schedule()
    assert schedule.alpha(clean).item() == 1.0
    assert schedule.sigma(clean).item() == 0.0
    assert schedule.snr(clean).item() == float("inf")
    x = drawn(0, rows=1)
    assert torch.equal(schedule.diffuse(x=x, eps=drawn(1, rows=1), t=clean), x)


def test_the_process_preserves_variance_and_only_loses_signal():
    t = torch.arange(-1, 1000)
    alpha, sigma = Schedule().alpha(t).double().flatten(), Schedule().sigma(t).double().flatten()
    np.testing.assert_allclose((alpha**2 + sigma**2).numpy(), 1.0, rtol=1e-6)
    assert (alpha.diff() < 0).all()
    assert alpha[-1].item() == pytest.approx(0.0682649, rel=1e-5)


def test_z_t_and_v_are_the_oracles():
    t, alpha, sigma = columns(TIMES)
    x, eps = drawn(0), drawn(1)
    schedule = Schedule()
    np.testing.assert_allclose(
        schedule.diffuse(x=x, eps=eps, t=t).numpy(), alpha * x.numpy() + sigma * eps.numpy(), atol=1e-6
    )
    np.testing.assert_allclose(
        schedule.velocity(x=x, eps=eps, t=t).numpy(), alpha * eps.numpy() - sigma * x.numpy(), atol=1e-6
    )


def test_estimates_from_eps_and_from_v_are_the_oracles():
    t, alpha, sigma = columns(TIMES)
    z_t, output = drawn(2), drawn(3)
    z, out = z_t.double().numpy(), output.double().numpy()
    from_eps = Schedule().from_eps(eps=output, z_t=z_t, t=t)
    # 1 / alpha_999 is 14.6, and scales the rounding of the float32 numerator with it.
    assert np.all(np.abs(from_eps.x.numpy() - (z - sigma * out) / alpha) < 2e-6 / alpha)
    assert torch.equal(from_eps.eps, output)
    from_v = Schedule().from_v(v=output, z_t=z_t, t=t)
    np.testing.assert_allclose(from_v.x.numpy(), alpha * z - sigma * out, atol=2e-6)
    np.testing.assert_allclose(from_v.eps.numpy(), sigma * z + alpha * out, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_true_output_gives_back_x_and_eps(prediction_type):
    t, alpha, _ = columns(TIMES)
    x, eps = drawn(0), drawn(1)
    schedule = Schedule()
    z_t = schedule.diffuse(x=x, eps=eps, t=t)
    output = eps if prediction_type == "epsilon" else schedule.velocity(x=x, eps=eps, t=t)
    estimate = schedule.estimate(output, z_t=z_t, t=t, prediction_type=prediction_type)
    assert torch.all((estimate.x - x).abs() < 2e-6 / torch.from_numpy(alpha))
    np.testing.assert_allclose(estimate.eps.numpy(), eps.numpy(), atol=2e-6)


def test_a_half_precision_output_is_converted_in_float32():
    t, _, _ = columns(TIMES)
    z_t, output = drawn(2), drawn(3).bfloat16()
    estimate = Schedule().estimate(output, z_t=z_t, t=t, prediction_type="v_prediction")
    in_full = Schedule().from_v(v=output.float(), z_t=z_t, t=t)
    assert estimate.x.dtype == torch.float32
    assert torch.equal(estimate.x, in_full.x)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"prediction_type is 'sample'; epsilon or v_prediction"):
        Schedule().estimate(drawn(0), z_t=drawn(1), t=torch.tensor(TIMES), prediction_type="sample")


@pytest.mark.parametrize("t", [-2, 1000])
def test_a_time_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match=r"-1 \.\. 999 is accepted"):
        Schedule().alpha(torch.tensor([0, t]))


@pytest.mark.parametrize(
    "values",
    [
        {"num_steps": 0},
        {"beta_start": 0.0},
        {"beta_end": 1.0},
        {"beta_start": 0.02},
        {"beta_start": float("nan")},
    ],
)
def test_betas_that_are_no_schedule_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Schedule(**values)


def test_schedules_are_compared_by_their_numbers():
    assert Schedule() == Schedule(beta_end=0.012)
    assert Schedule() != Schedule(beta_end=0.02)


def test_a_schedule_is_numbers_whatever_the_default_device_is():
    with torch.device("meta"):
        there = Schedule()
    t = torch.tensor([-1, 0, 999])
    assert torch.equal(there.alpha(t), Schedule().alpha(t))
    assert torch.equal(there.sigma(t), Schedule().sigma(t))
