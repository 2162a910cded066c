"""Distribution matching distillation: generator, fake score and GAN (Yin et al. 2024, DMD2).

Every draw of a row follows from the seed, its id and the step; that of the depth from the seed and the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snapfusion.distribution_matching import (
    fake_score_loss,
    generator_gan_loss,
    head_gan_loss,
    matching_loss,
)
from snapfusion.models.bundle import Bundle
from snapfusion.models.gan_head import middle_features
from snapfusion.noise import gaussian_batch, noise_key, step_noise, uniform
from snapfusion.sampling import sample, time_grid
from snapfusion.schedule import Estimate, Schedule
from snapfusion.solver_names import CONSISTENCY
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.draws import row_key
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.settings import Dmd2Settings
from snapfusion.training.velocity import draw_timesteps, predict_velocity

FAKE_SCORE, GAN_HEAD = "fake_score", "gan_head"
"""Names of the networks that are trained beside the generator, the model."""


def is_generator_step(step: int, *, fake_updates: int) -> bool:
    """Whether a step trains the generator: the last of each `fake_updates` + 1 (DMD2's Sec. 4.2)."""
    return step % (fake_updates + 1) == fake_updates


def draw_depth(seed: int, step: int, *, steps: int) -> int:
    """Draw the sampling step that a step trains at, 0 .. `steps` - 1, for all ranks and rows alike."""
    return int(uniform(noise_key("depth", seed, step), 1)[0] * steps)


_INPUT, _PAIR = "input", "pair"
"""Names of the noise that a sample begins with: of a step, and of the regression's pairs."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Captions c [B,L,D] float32, the key of each row, and the latents of the table [B,4,h,w] float32.

    `noise` has the noise of each draw, by its name, of the latents' shape.
    """

    c: Tensor
    keys: list[int]
    latents: Tensor
    depth: int
    noise: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Noised:
    """Latents x with noise eps at times t: x, eps and z_t [B,4,h,w] float32, t [B] int64."""

    x: Tensor
    eps: Tensor
    t: Tensor
    z_t: Tensor


class Dmd2Objective:
    """The losses of generator, fake score and GAN head (Yin et al. 2024): Eq. 2 and 4 of DMD2, Eq. 6 of DMD.

    The student, called generator, predicts v. Its input in training is what it has in sampling: noise, or
    its own sample of the step before, noised again (Sec. 4.5); one number of such steps before, the depth,
    is drawn for all rows of a step. The fake score begins as a copy of the teacher and predicts what it does.

    Args:
        settings: of the losses.
        teacher: the real score; runs in its own dtype.
        captions: encoder of teacher and student.
        seed: of all draws.
    """

    averages = ()

    def __init__(
        self, settings: Dmd2Settings, *, teacher: Bundle, captions: CaptionEncoder, seed: int
    ) -> None:
        self._settings, self._teacher, self._captions, self._seed = settings, teacher, captions, seed
        self._schedule = teacher.schedule
        self._grid = time_grid(settings.steps, schedule_steps=self._schedule.num_steps)

    def turn(self, step: int) -> tuple[str, ...]:
        """The generator, or the fake score with the GAN's head if there is one."""
        if is_generator_step(step, fake_updates=self._settings.fake_updates):
            return (MODEL,)
        return (FAKE_SCORE,) if self._settings.gan is None else (FAKE_SCORE, GAN_HEAD)

    def draw(self, batch: Batch, *, step: int) -> Batch:
        """As `snapfusion.training.row_draws.DrawingObjective.draw`: all noise of the step."""
        settings = self._settings
        if MODEL not in self.turn(step):
            return self._draw(batch, ["fake"] if settings.gan is None else ["fake", "real"], step=step)
        with_noise = self._draw(
            batch, ["matching"] if settings.gan is None else ["matching", "generator GAN"], step=step
        )
        if not settings.regression_weight or _column(_PAIR) in batch.columns:
            return with_noise
        keys = batch["noise_key"].tolist()
        return with_noise.with_columns({_column(_PAIR): gaussian_batch(keys, batch["latent"].shape[1:])})

    def __call__(self, networks: Networks, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]; the batch has columns latent, token_ids, or more.

        With the regression it is of PAIRS and has their noise_key, too.
        """
        rows = self._rows(self.draw(batch, step=step), step=step)
        if MODEL not in self.turn(step):
            return self._fake_loss(networks, rows)
        return self._generator_loss(networks, rows)

    @torch.no_grad()
    def held_out(self, networks: Networks, batch: Batch, *, step: int) -> Tensor:
        """The matching loss of held-out rows alone, float32 [B], with the networks as they are."""
        rows = self._rows(self._draw(batch, ["matching"], step=step), step=step)
        z, t = self._input(networks.bare[MODEL], rows)
        x = _estimate(networks.bare[MODEL], z, t, rows.c, schedule=self._schedule).x
        return self._matching_loss(networks, rows, x)

    def _draw(self, batch: Batch, draws: Sequence[str], *, step: int) -> Batch:
        """Add the noise of the input and of draws, by name."""
        if _column(_INPUT) in batch.columns:
            return batch
        keys, shape = self._keys(batch, step=step), batch["latent"].shape[1:]
        of_step = step_noise(keys, shape, device=torch.device("cpu"))
        noise = {_INPUT: gaussian_batch(keys, shape)}
        noise |= {f"step {t}": of_step(t) for t in self._grid[1 : self._depth(step) + 1]}
        noise |= {draw: gaussian_batch(_keys_of(draw, keys), shape) for draw in draws}
        return batch.with_columns({_column(name): eps for name, eps in noise.items()})

    def _keys(self, batch: Batch, *, step: int) -> list[int]:
        return [row_key(self._seed, row, step) for row in batch.ids]

    def _depth(self, step: int) -> int:
        return draw_depth(self._seed, step, steps=self._settings.steps)

    def _rows(self, batch: Batch, *, step: int) -> _Rows:
        """The rows of a batch that has the noise of the step."""
        on_device = batch.to(batch["latent"].device)
        return _Rows(
            c=self._captions.encode(batch["token_ids"]),
            keys=self._keys(batch, step=step),
            latents=batch["latent"],
            depth=self._depth(step),
            noise={
                name.removeprefix(_column("")): noise
                for name, noise in on_device.columns.items()
                if name.startswith(_column(""))
            },
        )

    @torch.no_grad()
    def _input(self, generator: nn.Module, rows: _Rows) -> tuple[Tensor, Tensor]:
        """The generator's input at the depth, z_t [B,4,h,w], and its t [B]: backward simulation, Sec. 4.5.

        The sampler's own steps and noise, so that an input is what `generate` would give it.
        """
        grid = self._grid[: rows.depth + 1]

        def denoise(z_t: Tensor, t: Tensor) -> Estimate:
            return _estimate(generator, z_t, t, rows.c, schedule=self._schedule)

        z_t = sample(
            denoise,
            rows.noise[_INPUT],
            grid=grid,
            schedule=self._schedule,
            solver=CONSISTENCY,
            noise=lambda t: rows.noise[f"step {t}"],
        )
        return z_t, torch.full((len(z_t),), grid[-1], dtype=torch.int64, device=z_t.device)

    def _generator_loss(self, networks: Networks, rows: _Rows) -> Tensor:
        """The loss of each row for the generator: matching, GAN and DMD's regression (Eq. 9), float32 [B]."""
        settings = self._settings
        z, t = self._input(networks.bare[MODEL], rows)
        passes = [(z, t, rows.c)]
        if settings.regression_weight:
            passes.append((rows.noise[_PAIR], torch.full_like(t, self._grid[0]), rows.c))
        # All passes are one batch, because DistributedDataParallel allows one forward call per step.
        z, t, c = (torch.cat(columns) for columns in zip(*passes, strict=True))
        x, *begun = _estimate(networks.trained[MODEL], z, t, c, schedule=self._schedule).x.split(len(rows.c))
        loss = self._matching_loss(networks, rows, x)
        if settings.gan is not None:
            noised = self._noised(x, rows, draw="generator GAN")
            with middle_features(networks.bare[FAKE_SCORE]) as features:
                predict_velocity(networks.bare[FAKE_SCORE], noised.z_t, noised.t, rows.c)
            logits = networks.bare[GAN_HEAD](features[0])
            loss = loss + settings.gan.generator_weight * generator_gan_loss(logits)
        for from_noise in begun:
            # DMD's Eq. 9 compares images by LPIPS; these are latents.
            error = (from_noise - rows.latents).square().mean(dim=(1, 2, 3))
            loss = loss + settings.regression_weight * error
        return loss

    def _matching_loss(self, networks: Networks, rows: _Rows, x: Tensor) -> Tensor:
        """The matching loss of samples x at times drawn for each row, float32 [B]."""
        first, last = (int(share * self._schedule.num_steps) for share in self._settings.matching_times)
        noised = self._noised(x.detach(), rows, draw="matching", first=first, last=last)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            real = self._teacher.denoiser(rows.c, w=self._settings.guidance, c_null=self._captions.null)
            x_real = real(noised.z_t, noised.t).x
        with torch.no_grad():
            output = predict_velocity(networks.bare[FAKE_SCORE], noised.z_t, noised.t, rows.c)
            x_fake = self._schedule.estimate(
                output, z_t=noised.z_t, t=noised.t, prediction_type=self._teacher.prediction_type
            ).x
        return matching_loss(x, x_real=x_real, x_fake=x_fake)

    def _fake_loss(self, networks: Networks, rows: _Rows) -> Tensor:
        """The loss of each row for the fake score, and for it and the head if there is a GAN, float32 [B]."""
        gan = self._settings.gan
        z, t = self._input(networks.bare[MODEL], rows)
        with torch.no_grad():
            x = _estimate(networks.bare[MODEL], z, t, rows.c, schedule=self._schedule).x
        fake = self._noised(x, rows, draw="fake")
        noised = [fake] if gan is None else [fake, self._noised(rows.latents, rows, draw="real")]
        # One batch, as above. The generated rows have their logits from the pass that learns to denoise them.
        with middle_features(networks.bare[FAKE_SCORE]) as features:
            output = predict_velocity(
                networks.trained[FAKE_SCORE],
                torch.cat([each.z_t for each in noised]),
                torch.cat([each.t for each in noised]),
                torch.cat([rows.c for _ in noised]),
            )
        loss = fake_score_loss(
            output[: len(x)],
            x=fake.x,
            eps=fake.eps,
            t=fake.t,
            schedule=self._schedule,
            prediction_type=self._teacher.prediction_type,
        )
        if gan is None:
            return loss
        generated, real = networks.trained[GAN_HEAD](features[0]).split(len(x))
        return loss + gan.head_weight * head_gan_loss(real=real, fake=generated)

    def _noised(
        self, x: Tensor, rows: _Rows, *, draw: str, first: int = 0, last: int | None = None
    ) -> _Noised:
        """Noise latents at times drawn for each row; `draw` keeps the draws of a step apart."""
        eps, keys = rows.noise[draw], _keys_of(draw, rows.keys)
        t = draw_timesteps(keys, schedule=self._schedule, first=first, last=last)
        t = t.to(x.device, non_blocking=True)
        return _Noised(x=x, eps=eps, t=t, z_t=self._schedule.diffuse(x=x, eps=eps, t=t))


def _column(name: str) -> str:
    """The column of a batch that holds the noise of a draw."""
    return f"noise of {name}"


def _keys_of(draw: str, keys: Sequence[int]) -> list[int]:
    """The keys of a draw from those of the rows."""
    return [noise_key(draw, key) for key in keys]


def _estimate(generator: nn.Module, z_t: Tensor, t: Tensor, c: Tensor, *, schedule: Schedule) -> Estimate:
    """The generator's x and eps at z_t."""
    return schedule.from_v(v=predict_velocity(generator, z_t, t, c), z_t=z_t, t=t)
