"""Distribution matching: gradient and losses against float64, and a generator that needs no change."""

import numpy as np
import pytest
import torch
from diffusion_oracles import SCHEDULE, alpha_sigma, randn

from snapfusion.distribution_matching import (
    fake_score_loss,
    generator_gan_loss,
    head_gan_loss,
    matching_gradient,
    matching_loss,
)


def test_loss_has_the_gradient_of_the_paper():
    x, x_real, x_fake = randn(0).requires_grad_(), randn(1), randn(2)
    real, fake, own = (tensor.detach().double().numpy() for tensor in (x_real, x_fake, x))
    distance = np.abs(own - real).mean(axis=(1, 2, 3), keepdims=True)
    expected = ((own - real) - (own - fake)) / distance
    loss = matching_loss(x, x_real=x_real, x_fake=x_fake)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.detach(), 0.5 * (expected**2).mean(axis=(1, 2, 3)), rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    np.testing.assert_allclose(gradient, expected / expected[0].size, rtol=0, atol=1e-7)


def test_row_that_the_teacher_would_keep_has_no_gradient():
    x = randn(0)
    assert not matching_gradient(x, x_real=x, x_fake=x).any()
    assert matching_gradient(x, x_real=x, x_fake=x + 1.0).isfinite().all()


def gaussian_denoiser(z_t, t, *, deviation):
    """The best x at z_t where the data are Gaussian of this deviation: in closed form."""
    alpha, sigma = alpha_sigma(t)
    return alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * z_t


@pytest.mark.parametrize("t", [20, 249, 500, 980])
@pytest.mark.parametrize(("deviation", "sign"), [(0.7, 0), (0.8, 1), (0.6, -1)])
def test_perfect_generator_has_no_gradient(t, deviation, sign):
    """The teacher's data have deviation 0.7. The fake score is the best one for the generator's samples."""
    x = deviation * randn(3, (64, 4, 8, 8))
    z_t = SCHEDULE.diffuse(x=x, eps=randn(4, x.shape), t=torch.full((64,), t))
    x_real, x_fake = (gaussian_denoiser(z_t, t, deviation=own) for own in (0.7, deviation))
    gradient = matching_gradient(x, x_real=x_real, x_fake=x_fake)
    if not sign:
        assert not gradient.any()
        assert not matching_loss(x, x_real=x_real, x_fake=x_fake).any()
    # Down the gradient samples that are spread too far come together, and the others part.
    assert np.sign(float((gradient * x).mean())) == sign


def test_gan_losses_are_cross_entropies():
    real, fake = torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-2.0, 5.0, 0.0])
    chance_real, chance_fake = (1.0 / (1.0 + np.exp(-logits.double().numpy())) for logits in (real, fake))
    expected = -np.log(chance_real) - np.log(1.0 - chance_fake)
    np.testing.assert_allclose(head_gan_loss(real=real, fake=fake), expected, rtol=1e-6)
    np.testing.assert_allclose(generator_gan_loss(fake), -np.log(chance_fake), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_fake_score_learns_what_the_teacher_predicts(prediction_type):
    output, x, eps, t = randn(0), randn(1), randn(2), torch.tensor([0, 999])
    found = fake_score_loss(
        output, x=x, eps=eps, t=t, schedule=SCHEDULE, prediction_type=prediction_type
    ).numpy()
    for row in range(2):
        (alpha, sigma), own = alpha_sigma(int(t[row])), output[row].double().numpy()
        noise, clean = eps[row].double().numpy(), x[row].double().numpy()
        target = noise if prediction_type == "epsilon" else alpha * noise - sigma * clean
        assert found[row] == pytest.approx(((own - target) ** 2).mean(), rel=1e-5)
