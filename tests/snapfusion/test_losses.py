import pytest
import torch

from snapfusion.losses import combined_loss, distillation_loss, distillation_weight, velocity_loss
from snapfusion.schedule import Schedule

SCHEDULE = Schedule()


def drawn(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 2, 2, generator=generator)


def test_velocity_loss_is_zero_at_the_true_velocity():
    x, eps, t = drawn(0), drawn(1), torch.tensor([0, 500, 999])
    v = SCHEDULE.velocity(x=x, eps=eps, t=t)
    assert velocity_loss(v, x=x, eps=eps, t=t, schedule=SCHEDULE).tolist() == [0.0, 0.0, 0.0]


def test_velocity_loss_is_the_mean_square_of_each_sample():
    x, eps, t = drawn(0), drawn(1), torch.tensor([0, 500, 999])
    alpha, sigma = SCHEDULE.alpha(t).double(), SCHEDULE.sigma(t).double()
    v_hat = drawn(2)
    expected = ((v_hat - (alpha * eps - sigma * x)) ** 2).mean(dim=(1, 2, 3))
    loss = velocity_loss(v_hat, x=x, eps=eps, t=t, schedule=SCHEDULE)
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_velocity_loss_is_float32_whatever_the_network_computes_in():
    x, eps, t = drawn(0), drawn(1), torch.tensor([0, 500, 999])
    loss = velocity_loss(drawn(2).bfloat16(), x=x, eps=eps, t=t, schedule=SCHEDULE)
    assert loss.dtype == torch.float32
    assert loss.shape == (3,)


def test_the_distillation_weight_is_a_floor():
    t = torch.arange(1000)
    snr = SCHEDULE.snr(t).flatten()
    weight = distillation_weight(t, schedule=SCHEDULE)
    assert weight.shape == (1000,)
    assert weight.min() == 1.0
    assert torch.equal(weight[snr > 1], snr[snr > 1])
    assert weight[-1] == 1.0
    assert weight[0] > 1000


def test_distillation_loss_is_the_larger_of_the_errors_in_x_and_in_eps():
    x_hat, target, z_t, t = drawn(0), drawn(1), drawn(2), torch.tensor([10, 500, 999])
    loss = distillation_loss(x_hat, x_target=target, t=t, schedule=SCHEDULE)
    alpha, sigma = SCHEDULE.alpha(t).double(), SCHEDULE.sigma(t).double()
    in_x = (x_hat - target).double().square().mean(dim=(1, 2, 3))
    eps = [(z_t - alpha * x) / sigma for x in (x_hat, target)]
    in_eps = (eps[0] - eps[1]).square().mean(dim=(1, 2, 3))
    assert loss.tolist() == pytest.approx(torch.maximum(in_x, in_eps).tolist(), rel=1e-5)
    assert loss.dtype == torch.float32


def test_the_losses_are_added_with_gamma():
    mixed = combined_loss(
        distillation=torch.tensor([1.0, 2.0]), original=torch.tensor([10.0, 0.0]), gamma=0.2
    )
    assert mixed.tolist() == [3.0, 2.0]
