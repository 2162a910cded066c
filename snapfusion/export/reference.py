"""Reference images and activations computed by torch, which compiled programs are compared with.

Uses the model's own modules, schedule and guidance, and none of this package's, so that an error in either
cannot cancel out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from snapfusion.export.loop import SamplingStep
from snapfusion.models.bundle import Bundle
from snapfusion.models.defaults import distilled_solver, needs_one_pass, sampling_grid
from snapfusion.noise import gaussian, noise_key, step_noise
from snapfusion.sampling import CLEAN, guide
from snapfusion.schedule import Estimate
from snapfusion.solver_names import CONSISTENCY
from snapfusion.solvers import ddim_step

Decode = Callable[[Tensor], Tensor]
"""Latents [B,4,h,w] to images [B,3,H,W] in -1 .. 1."""

Sample = tuple[list[np.ndarray], np.ndarray]
"""Inputs of a module, and the expected output."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One caption's image and intermediate values, by torch in float32.

    Attributes:
        caption: the text.
        ids: int32 [2,L], of the empty caption and of the caption.
        c: float32 [2,L,D].
        noise: float32 [1,4,h,w].
        steps: of the sampling loop.
        image: float32 [1,3,H,W] in 0 .. 1.
    """

    caption: str
    ids: np.ndarray
    c: np.ndarray
    noise: np.ndarray
    steps: tuple[SamplingStep, ...]
    image: np.ndarray

    @property
    def latent(self) -> np.ndarray:
        """The clean latent, float32 [1,4,h,w]."""
        return self.steps[-1].z_next

    def fresh_noise(self, t: int) -> np.ndarray:
        """The noise that the step to t adds, float32 [1,4,h,w].

        Raises:
            ValueError: if it adds none.
        """
        for step, after in pairwise(self.steps):
            if after.t == t and step.fresh is not None:
                return step.fresh
        raise ValueError(f"the reference adds no noise at t = {t}")


def samples_of(references: Sequence[Reference], *, module: str, conditions: int) -> list[Sample]:
    """Real activations of one module: its inputs and outputs during the generation of `references`."""
    return [sample for reference in references for sample in _SAMPLES[module](reference, conditions)]


def _text_encoder_samples(reference: Reference, _: int) -> Iterator[Sample]:
    for ids, c in zip(reference.ids, reference.c, strict=True):
        yield [ids[None]], c[None]


def _unet_samples(reference: Reference, conditions: int) -> Iterator[Sample]:
    for step in reference.steps:
        t = np.array([step.t], np.float32)
        c = reference.c[-len(step.outputs) :]
        for first in range(0, len(c), conditions):
            rows = slice(first, first + conditions)
            yield [step.z_t, t, c[rows]], step.outputs[rows]


def _decoder_samples(reference: Reference, _: int) -> Iterator[Sample]:
    yield [reference.latent], reference.image


_SAMPLES = {"text_encoder": _text_encoder_samples, "unet": _unet_samples, "decoder": _decoder_samples}


@torch.inference_mode()
def generate_reference(
    bundle: Bundle,
    *,
    decode: Decode,
    caption: str,
    num_steps: int,
    w: float,
    seed: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> Reference:
    """Generate one caption's image from the noise that `snapfusion generate --seed` uses.

    A model is sampled as it was distilled: by DDIM, or with fresh noise at each step. One that needs one pass
    a step (`needs_one_pass`) takes it for the caption alone, and w as its input.
    `on_step` is called with the number of steps done after each.
    """
    ids = bundle.tokenize(["", caption])
    c = bundle.encode_text(ids)
    key, solver = noise_key(seed, caption, 0), distilled_solver(bundle)
    noise = gaussian(key, bundle.latent_shape)[None]
    renoise = step_noise([key], bundle.latent_shape, device=noise.device)
    steps, z_t = [], noise
    for t, t_next in pairwise(sampling_grid(bundle, steps=num_steps, solver=solver)):
        time = torch.tensor([t])
        outputs = _outputs(bundle, z_t, time, c, w=w)
        output = outputs if len(outputs) == 1 else guide(cond=outputs[1:], uncond=outputs[:1], w=w)
        estimate = bundle.schedule.estimate(output, z_t=z_t, t=time, prediction_type=bundle.prediction_type)
        fresh = renoise(t_next) if solver == CONSISTENCY and t_next != CLEAN else None
        if fresh is not None:
            estimate = Estimate(x=estimate.x, eps=fresh)
        z_next = ddim_step(estimate, t_next=torch.tensor([t_next]), schedule=bundle.schedule)
        steps.append(
            SamplingStep(
                t=t,
                z_t=z_t.numpy(),
                outputs=outputs.numpy(),
                z_next=z_next.numpy(),
                fresh=None if fresh is None else fresh.numpy(),
            )
        )
        z_t = z_next
        on_step(len(steps))
    image = decode(z_t).float().clamp(-1.0, 1.0) * 0.5 + 0.5
    return Reference(
        caption=caption,
        ids=ids.numpy().astype(np.int32),
        c=c.numpy(),
        noise=noise.numpy(),
        steps=tuple(steps),
        image=image.numpy(),
    )


def _outputs(bundle: Bundle, z_t: Tensor, t: Tensor, c: Tensor, *, w: float) -> Tensor:
    """The outputs for the empty caption and for the caption; of one that needs one pass, for the latter."""
    if needs_one_pass(bundle):
        return bundle.predict(z_t, t, c[1:], w=w)
    return bundle.predict(z_t.repeat(2, 1, 1, 1), t.repeat(2), c)
