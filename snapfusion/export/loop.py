"""Text to image with compiled programs alone, in NumPy, as an application does it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from snapfusion.export.sampler_coefficients import SamplerCoefficients, StepCoefficients

RunModule = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Inputs in the order of the ports -> the first output."""

FreshNoise = Callable[[int], np.ndarray]
"""(t) -> the unit Gaussian noise that a step to t adds, [1,4,h,w] float32."""


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
        fresh: [1,4,h,w] float32, the noise that the step adds; None if it adds none.
    """

    t: int
    z_t: np.ndarray
    outputs: np.ndarray
    z_next: np.ndarray
    fresh: np.ndarray | None = None


def encode_text(model: CompiledModel, *, ids: np.ndarray) -> np.ndarray:
    """c of each row of token ids, [B,L] int32 to [B,L,D] float32."""
    return np.concatenate([model.text_encoder([row[None]]) for row in ids])


def sampling_steps(
    model: CompiledModel,
    *,
    c: np.ndarray,
    noise: np.ndarray,
    sampler: SamplerCoefficients,
    w: float,
    fresh_noise: FreshNoise | None = None,
) -> Iterator[SamplingStep]:
    """The steps from noise to the clean latent. SnapFusion Eq. 2, 3.

    With w = 1 and one condition a call, the UNet is called for the caption alone.

    Args:
        model: compiled programs.
        c: [2,L,D] float32, of the empty caption and of the caption.
        noise: [1,4,h,w] float32.
        sampler: the coefficients of its steps.
        w: the guidance scale.
        fresh_noise: of the steps that add some; called once for each of them.

    Raises:
        ValueError: if a step adds noise and there is no `fresh_noise`.
    """
    z_t: np.ndarray = noise.astype(np.float32)
    if model.conditions == 1 and w == 1.0:
        c = c[1:]
    parts = [c] if model.conditions == len(c) else np.split(c, len(c))
    for step in sampler.steps:
        t = np.array([step.t], np.float32)
        outputs = np.concatenate([model.unet([z_t, t, part]) for part in parts])
        fresh = fresh_noise(step.t_next) if step.from_noise and fresh_noise is not None else None
        z_next = next_latent(step, z_t=z_t, output=guided_output(outputs, w=w), fresh=fresh)
        yield SamplingStep(t=step.t, z_t=z_t, outputs=outputs, z_next=z_next, fresh=fresh)
        z_t = z_next


def guided_output(outputs: np.ndarray, *, w: float) -> np.ndarray:
    """w cond - (w - 1) uncond in float32, as an application computes it; a single output is cond."""
    if len(outputs) == 1:
        return outputs
    uncond, cond = outputs[:1], outputs[1:]
    return np.float32(w) * cond - np.float32(w - 1.0) * uncond


def next_latent(
    step: StepCoefficients, *, z_t: np.ndarray, output: np.ndarray, fresh: np.ndarray | None
) -> np.ndarray:
    """The latent after a step in float32, as an application computes it, [1,4,h,w].

    Raises:
        ValueError: if the step adds noise and `fresh` is None.
    """
    z_next: np.ndarray = np.float32(step.from_z) * z_t + np.float32(step.from_output) * output
    if not step.from_noise:
        return z_next
    if fresh is None:
        raise ValueError(f"the step at t = {step.t} adds noise, and none is given")
    return z_next + np.float32(step.from_noise) * fresh


def generate(
    model: CompiledModel,
    *,
    ids: np.ndarray,
    noise: np.ndarray,
    sampler: SamplerCoefficients,
    w: float,
    fresh_noise: FreshNoise | None = None,
) -> np.ndarray:
    """The image [1,3,H,W] float32 in 0 .. 1 of token ids [2,L] (the empty caption's, the caption's)."""
    c = encode_text(model, ids=ids)
    *_, last = sampling_steps(model, c=c, noise=noise, sampler=sampler, w=w, fresh_noise=fresh_noise)
    return model.decoder([last.z_next])


def to_uint8_image(image: np.ndarray) -> np.ndarray:
    """[1,3,H,W] in 0 .. 1 as uint8 [H,W,3], rounded to nearest."""
    return np.rint(image[0].transpose(1, 2, 0) * 255.0).clip(0, 255).astype(np.uint8)
