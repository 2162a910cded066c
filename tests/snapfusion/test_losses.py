import pytest
import torch

from snapfusion.losses import velocity_loss
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
