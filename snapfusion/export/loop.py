"""Text to image with compiled programs alone, in NumPy, as an application does it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapfusion.export.sampler_coefficients import SamplerCoefficients

RunModule = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Inputs in the order of the ports -> the first output."""


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """The three programs of a model, for any runtime.

    Attributes:
        text_encoder: token_ids [1,L] int32 -> c [1,L,D].
        unet: z_t [1,4,h,w], t [1], c [n,L,D] -> output [n,4,h,w].
        decoder: latent [1,4,h,w] -> image [1,3,H,W] in 0 .. 1.
        conditions: n, the conditions per call of the UNet: 2, or 1 and it is called twice.
    """

    text_encoder: RunModule
    unet: RunModule
    decoder: RunModule
    conditions: int


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """One step of the sampling loop.

    Attributes:
        t: the time.
        z_t: [1,4,h,w] float32, before.
        outputs: [2,4,h,w] float32, of the UNet for the empty caption and for the caption; or [1,4,h,w], for
            the caption alone.
        z_next: [1,4,h,w] float32, after.
    """

    t: int
    z_t: np.ndarray
    outputs: np.ndarray
    z_next: np.ndarray


def encode_text(model: CompiledModel, *, ids: np.ndarray) -> np.ndarray:
    """c of each row of token ids, [B,L] int32 to [B,L,D] float32."""
    return np.concatenate([model.text_encoder([row[None]]) for row in ids])


def sampling_steps(
    model: CompiledModel, *, c: np.ndarray, noise: np.ndarray, sampler: SamplerCoefficients, w: float
) -> Iterator[SamplingStep]:
    """The steps from noise to the clean latent. SnapFusion Eq. 2, 3.

    With w = 1 and one condition a call, the UNet is called for the caption alone.

    Args:
        model: compiled programs.
        c: [2,L,D] float32, of the empty caption and of the caption.
        noise: [1,4,h,w] float32.
        sampler: the coefficients of its steps.
        w: the guidance scale.
    """
    z_t: np.ndarray = noise.astype(np.float32)
    if model.conditions == 1 and w == 1.0:
        c = c[1:]
    parts = [c] if model.conditions == len(c) else np.split(c, len(c))
    for step in sampler.steps:
        t = np.array([step.t], np.float32)
        outputs = np.concatenate([model.unet([z_t, t, part]) for part in parts])
        output = guided_output(outputs, w=w)
        z_next = np.float32(step.from_z) * z_t + np.float32(step.from_output) * output
        yield SamplingStep(t=step.t, z_t=z_t, outputs=outputs, z_next=z_next)
        z_t = z_next


def guided_output(outputs: np.ndarray, *, w: float) -> np.ndarray:
    """w cond - (w - 1) uncond in float32, as an application computes it; a single output is cond."""
    if len(outputs) == 1:
        return outputs
    uncond, cond = outputs[:1], outputs[1:]
    return np.float32(w) * cond - np.float32(w - 1.0) * uncond


def generate(
    model: CompiledModel, *, ids: np.ndarray, noise: np.ndarray, sampler: SamplerCoefficients, w: float
) -> np.ndarray:
    """The image [1,3,H,W] float32 in 0 .. 1 of token ids [2,L] (the empty caption's, the caption's)."""
    *_, last = sampling_steps(model, c=encode_text(model, ids=ids), noise=noise, sampler=sampler, w=w)
    return model.decoder([last.z_next])


def to_uint8_image(image: np.ndarray) -> np.ndarray:
    """[1,3,H,W] in 0 .. 1 as uint8 [H,W,3], rounded to nearest."""
    return np.rint(image[0].transpose(1, 2, 0) * 255.0).clip(0, 255).astype(np.uint8)
