"""What torch draws: the pictures, and everything on the way, that compiled programs are held to.

Computed by the model's own modules, schedule and guidance, and by none of this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from snapfusion.export.loop import SamplingStep
from snapfusion.models.bundle import Bundle
from snapfusion.noise import gaussian, noise_key
from snapfusion.sampling import guide, time_grid
from snapfusion.solvers import ddim_step

Decode = Callable[[Tensor], Tensor]
"""Latents [B,4,h,w] to images [B,3,H,W] in -1 .. 1."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One caption, drawn by torch in float32.

    Attributes:
        caption: the text.
        ids: int32 [2,L], of the empty caption and of the caption.
        c: float32 [2,L,D].
        noise: float32 [1,4,h,w].
        moments: the steps.
        image: float32 [1,3,H,W] in 0 .. 1.
    """

    caption: str
    ids: np.ndarray
    c: np.ndarray
    noise: np.ndarray
    moments: tuple[SamplingStep, ...]
    image: np.ndarray

    @property
    def latent(self) -> np.ndarray:
        """Where the steps ended, float32 [1,4,h,w]."""
        return self.moments[-1].z_next


Sample = tuple[list[np.ndarray], np.ndarray]
"""Inputs of a module, and the output that is right."""


def samples_of(references: Sequence[Reference], *, module: str, conditions: int) -> list[Sample]:
    """Real activations of the module of that name: what it was given, and what it made of it.

    Raises:
        ValueError: if there is no such module.
    """
    if module not in _SAMPLES:
        raise ValueError(f"there is no module {module!r}; {', '.join(_SAMPLES)} are")
    return [sample for reference in references for sample in _SAMPLES[module](reference, conditions)]


def _of_text_encoder(reference: Reference, _: int) -> Iterator[Sample]:
    for ids, c in zip(reference.ids, reference.c, strict=True):
        yield [ids[None]], c[None]


def _of_unet(reference: Reference, conditions: int) -> Iterator[Sample]:
    for moment in reference.moments:
        t = np.array([moment.t], np.float32)
        for first in range(0, 2, conditions):
            half = slice(first, first + conditions)
            yield [moment.z_t, t, reference.c[half]], moment.outputs[half]


def _of_decoder(reference: Reference, _: int) -> Iterator[Sample]:
    yield [reference.latent], reference.image


_SAMPLES = {"text_encoder": _of_text_encoder, "unet": _of_unet, "decoder": _of_decoder}


@torch.inference_mode()
def generate_reference(
    bundle: Bundle, *, decode: Decode, caption: str, number_of_steps: int, w: float, seed: int
) -> Reference:
    """Draw one caption; its noise is that of `snapfusion generate --seed`."""
    ids = bundle.tokenize(["", caption])
    c = bundle.encode_text(ids)
    noise = gaussian(noise_key(seed, caption, 0), bundle.latent_shape)[None]
    grid = time_grid(number_of_steps, schedule_steps=bundle.schedule.num_steps)
    moments, z_t = [], noise
    for t, t_next in pairwise(grid):
        moment = _step(bundle, z_t=z_t, c=c, t=t, t_next=t_next, w=w)
        moments.append(moment)
        z_t = torch.from_numpy(moment.z_next)
    image = decode(z_t).float().clamp(-1.0, 1.0) * 0.5 + 0.5
    return Reference(
        caption=caption,
        ids=ids.numpy().astype(np.int32),
        c=c.numpy(),
        noise=noise.numpy(),
        moments=tuple(moments),
        image=image.numpy(),
    )


def _step(bundle: Bundle, *, z_t: Tensor, c: Tensor, t: int, t_next: int, w: float) -> SamplingStep:
    time, next_time = torch.tensor([t]), torch.tensor([t_next])
    outputs = bundle.predict(z_t.repeat(2, 1, 1, 1), time.repeat(2), c)
    uncond, cond = outputs.chunk(2)
    estimate = bundle.schedule.estimate(
        guide(cond=cond, uncond=uncond, w=w), z_t=z_t, t=time, prediction_type=bundle.prediction_type
    )
    z_next = ddim_step(estimate, t_next=next_time, schedule=bundle.schedule)
    return SamplingStep(t=t, z_t=z_t.numpy(), outputs=outputs.numpy(), z_next=z_next.numpy())
