"""The original diffusion loss, L_ori, of a v-prediction network. SnapFusion Eq. 6."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snapfusion.losses import velocity_loss
from snapfusion.models.guidance_embedding import guidance_embedding
from snapfusion.noise import gaussian_batch, noise_key, uniform
from snapfusion.schedule import Schedule
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.settings import VelocitySettings

_EPS, _TIME, _DROPPED = "original_eps", "original_t", "original_dropped"
"""Columns of a batch with draws: eps of the latent's shape, t int64 [B], and dropped captions, bool [B]."""


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """Noised rows: x, eps and z_t [B,4,h,w] float32, t [B] int64, c [B,L,D] float32."""

    x: Tensor
    eps: Tensor
    z_t: Tensor
    t: Tensor
    c: Tensor

    def loss(self, v_hat: Tensor, *, schedule: Schedule) -> Tensor:
        """L_ori of the predicted velocity, float32 [B]. SnapFusion Eq. 6."""
        return velocity_loss(v_hat, x=self.x, eps=self.eps, t=self.t, schedule=schedule)


class NoiseSampler:
    """Draws t ~ U over the whole schedule, eps, and caption dropout for Eq. 6.

    The draws of a row follow from the seed, its id and the step, whatever batch it is in.
    """

    def __init__(
        self, *, captions: CaptionEncoder, schedule: Schedule, seed: int, caption_dropout: float
    ) -> None:
        self._captions, self._schedule = captions, schedule
        self._seed, self._caption_dropout = seed, caption_dropout

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """Add the draws of the rows, as `DrawingObjective.draw`."""
        if _EPS in batch.columns:
            return batch
        # The word keeps these draws independent of those of the distillation loss on the same row.
        keys = [noise_key("original", self._seed, row, step) for row in batch.ids]
        return batch.with_columns(
            {
                _EPS: gaussian_batch(keys, batch["latent"].shape[1:]),
                _TIME: draw_timesteps(keys, schedule=self._schedule),
                _DROPPED: draw_caption_dropout(keys, fraction=self._caption_dropout),
            }
        )

    def __call__(self, batch: Batch, *, step: int) -> NoisyBatch:
        """Noise the rows of `batch`, which has columns latent and token_ids, on its device."""
        x = batch["latent"]
        with_draws = self.draw(batch, step=step).to(x.device)
        eps, t, dropped = (with_draws[name] for name in (_EPS, _TIME, _DROPPED))
        return NoisyBatch(
            x=x,
            eps=eps,
            z_t=self._schedule.diffuse(x=x, eps=eps, t=t),
            t=t,
            c=self._captions.encode(batch["token_ids"], dropped=dropped),
        )


def draw_timesteps(
    keys: Sequence[int], *, schedule: Schedule, first: int = 0, last: int | None = None
) -> Tensor:
    """Draw t of each row, uniform over `first` .. `last`, by its key: int64 [B]. SnapFusion Eq. 6.

    By default over the whole schedule, 0 .. T-1.
    """
    count = (schedule.num_steps if last is None else last + 1) - first
    return torch.tensor([first + int(uniform(noise_key("time", key), 1)[0] * count) for key in keys])


def predict_velocity(
    model: nn.Module, z_t: Tensor, t: Tensor, c: Tensor, *, w: Tensor | None = None
) -> Tensor:
    """Run the UNet: float32 [B,4,h,w]; `w`, float32 [B], is for a w-conditioned UNet."""
    condition = {} if w is None else {"timestep_cond": guidance_embedding(w)}
    return model(z_t, t, encoder_hidden_states=c, return_dict=False, **condition)[0].float()


class VelocityObjective:
    """L_ori of each row. `model` is a UNet that learns to predict v, whatever it predicted before."""

    def __init__(
        self, settings: VelocitySettings, *, captions: CaptionEncoder, schedule: Schedule, seed: int
    ) -> None:
        self._schedule = schedule
        self._add_noise = NoiseSampler(
            captions=captions, schedule=schedule, seed=seed, caption_dropout=settings.caption_dropout
        )

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `DrawingObjective.draw`."""
        return self._add_noise.draw(batch, step=step)

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]; the batch has columns latent and token_ids."""
        noisy = self._add_noise(batch, step=step)
        v_hat = predict_velocity(model, noisy.z_t, noisy.t, noisy.c)
        return noisy.loss(v_hat, schedule=self._schedule)
