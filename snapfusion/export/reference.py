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
from snapfusion.models.defaults import needs_one_pass
from snapfusion.noise import gaussian, noise_key
from snapfusion.sampling import guide, time_grid
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

    A model that needs one pass a step (`needs_one_pass`) takes it for the caption alone, and w as its input.
    `on_step` is called with the number of steps done after each.
    """
    ids = bundle.tokenize(["", caption])
    c = bundle.encode_text(ids)
    noise = gaussian(noise_key(seed, caption, 0), bundle.latent_shape)[None]
    steps, z_t, one_pass = [], noise, needs_one_pass(bundle)
    for t, t_next in pairwise(time_grid(num_steps, schedule_steps=bundle.schedule.num_steps)):
        time = torch.tensor([t])
        if one_pass:
            output = outputs = bundle.predict(z_t, time, c[1:], w=w)
        else:
            outputs = bundle.predict(z_t.repeat(2, 1, 1, 1), time.repeat(2), c)
            uncond, cond = outputs.chunk(2)
            output = guide(cond=cond, uncond=uncond, w=w)
        estimate = bundle.schedule.estimate(output, z_t=z_t, t=time, prediction_type=bundle.prediction_type)
        z_next = ddim_step(estimate, t_next=torch.tensor([t_next]), schedule=bundle.schedule)
        steps.append(SamplingStep(t=t, z_t=z_t.numpy(), outputs=outputs.numpy(), z_next=z_next.numpy()))
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
