import pytest
import torch
from diffusion_oracles import SCHEDULE, randn

from snapfusion.losses import combined_loss, distillation_loss, distillation_weight, velocity_loss

SHAPE = (3, 4, 2, 2)
X, EPS, OTHER = (randn(seed, SHAPE) for seed in range(3))
T = torch.tensor([0, 500, 999])


def loss_of(v_hat):
    return velocity_loss(v_hat, x=X, eps=EPS, t=T, schedule=SCHEDULE)


def test_velocity_loss_is_zero_at_the_true_velocity():
    assert loss_of(SCHEDULE.velocity(x=X, eps=EPS, t=T)).tolist() == [0.0, 0.0, 0.0]


def test_velocity_loss_is_each_rows_mean_square():
    alpha, sigma = SCHEDULE.alpha(T).double(), SCHEDULE.sigma(T).double()
    expected = ((OTHER - (alpha * EPS - sigma * X)) ** 2).mean(dim=(1, 2, 3))
    assert loss_of(OTHER).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_velocity_loss_of_half_precision_is_float32():
    loss = loss_of(OTHER.bfloat16())
    assert (loss.dtype, loss.shape) == (torch.float32, (3,))


def test_distillation_weight_is_at_least_one():
    t = torch.arange(1000)
    snr = SCHEDULE.snr(t).flatten()
    weight = distillation_weight(t, schedule=SCHEDULE)
    assert weight.shape == (1000,)
    assert weight.min() == 1.0
    assert torch.equal(weight[snr > 1], snr[snr > 1])
    assert weight[-1] == 1.0
    assert weight[0] > 1000


def test_distillation_loss_is_the_larger_error():
    z_t, t = OTHER, torch.tensor([10, 500, 999])
    loss = distillation_loss(X, x_target=EPS, t=t, schedule=SCHEDULE)
    alpha, sigma = SCHEDULE.alpha(t).double(), SCHEDULE.sigma(t).double()
    in_x = (X - EPS).double().square().mean(dim=(1, 2, 3))
    eps = [(z_t - alpha * x) / sigma for x in (X, EPS)]
    in_eps = (eps[0] - eps[1]).square().mean(dim=(1, 2, 3))
    assert loss.tolist() == pytest.approx(torch.maximum(in_x, in_eps).tolist(), rel=1e-5)
    assert loss.dtype == torch.float32


def test_losses_are_added_with_gamma():
    loss = combined_loss(distillation=torch.tensor([1.0, 2.0]), original=torch.tensor([10.0, 0.0]), gamma=0.2)
    assert loss.tolist() == [3.0, 2.0]
