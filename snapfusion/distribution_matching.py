"""Distribution matching: a generator whose samples a frozen teacher finds as likely as its own.

DMD is (Yin et al. 2024), arXiv 2311.18828, and DMD2 its successor by the same first author, arXiv 2405.14867.

symbol   meaning                                                       shape        dtype
x        the generator's estimate of the clean latent                  [B,4,h,w]    float32
x_real   the guided teacher's estimate from x, noised to a time t      [B,4,h,w]    float32
x_fake   the fake score's, a denoiser of the generator's samples       [B,4,h,w]    float32
logits   of a latent being real, by the head on the fake score         [B]          float32

The two scores (DMD's Eq. 4 and 5, DMD2's Eq. 1) differ by (x_fake - x_real) alpha_t / sigma_t^2, and DMD's
Eq. 8 weights the difference by sigma_t^2 / alpha_t, so t appears in no formula here. DMD's Eq. 7 has a
further alpha_t, the derivative of z_t in x, which the published code leaves out; so does this. Other notation
as in `snapfusion.schedule`.
"""

from torch import Tensor
from torch.nn.functional import softplus

from snapfusion.losses import velocity_loss
from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule


def matching_gradient(x: Tensor, *, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """((x - x_real) - (x - x_fake)) over the row's mean |x - x_real|: Eq. 7 and 8 of DMD (Yin et al. 2024).

    DMD2's Eq. 2 is Eq. 7 without its weight. Symbols as in the legend. [B,4,h,w] float32; a row that is where
    the teacher wants it has none.
    """
    distance = (x - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return ((x_fake - x_real) / distance).nan_to_num()


def matching_loss(x: Tensor, *, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """A loss whose gradient in x is `matching_gradient` over the elements of a row (Yin et al. 2024).

    It is half the gradient's mean square: its value says how far the two scores are apart, and falls to 0
    where the generator's samples are distributed as the teacher's.

    Args:
        x: [B,4,h,w] float32, with a gradient.
        x_real: [B,4,h,w] float32.
        x_fake: [B,4,h,w] float32.

    Returns:
        [B] float32, non-negative.
    """
    gradient = matching_gradient(x.detach(), x_real=x_real.detach(), x_fake=x_fake.detach())
    return 0.5 * (x - (x.detach() - gradient)).square().mean(dim=(1, 2, 3))


def fake_score_loss(
    output: Tensor,
    *,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
) -> Tensor:
    """The denoising loss of the fake score on the generator's samples: Eq. 6 of DMD (Yin et al. 2024).

    Not guided. The mean squared error of what the network predicts, as in the teacher's own training.

    Args:
        output: the network's at z_t = alpha_t x + sigma_t eps, [B,4,h,w].
        x: the generator's samples, [B,4,h,w] float32.
        eps: noise [B,4,h,w] float32.
        t: [B] int64.
        schedule: gives alpha_t and sigma_t.
        prediction_type: "epsilon" or "v_prediction".

    Returns:
        [B] float32, non-negative.
    """
    if prediction_type == "v_prediction":
        return velocity_loss(output, x=x, eps=eps, t=t, schedule=schedule)
    return (output.float() - eps).square().mean(dim=(1, 2, 3))


def generator_gan_loss(fake: Tensor) -> Tensor:
    """-log D of the generator's samples, which are to pass for real: [B] float32 of their logits [B].

    The second term of Eq. 4 of DMD2 (Yin et al. 2024), where log D is -softplus(-logits).
    """
    return softplus(-fake)


def head_gan_loss(*, real: Tensor, fake: Tensor) -> Tensor:
    """-log D of real latents and -log(1 - D) of the generator's, added: [B] float32 of logits [B] each.

    The GAN loss of DMD2's code for the fake score and its head (Yin et al. 2024). The paper's Eq. 4, which
    they are to maximize, has -log D in place of log(1 - D).
    """
    return softplus(fake) + softplus(-real)
