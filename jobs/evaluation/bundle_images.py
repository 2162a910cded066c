"""Generates images of a caption by the programs of a mobile bundle alone."""

import numpy as np
import torch
from tqdm import tqdm

from jobs.evaluation.images import NonFiniteImageError, OnStep
from jobs.runtime.logs import logger
from snapfusion.export.bundle import EXECUTORCH, ONNX_RUNTIME, MobileBundle
from snapfusion.export.bundle_files import BundleError
from snapfusion.export.loop import CompiledModel, FreshNoise, encode_text, sampling_steps, to_uint8_image
from snapfusion.models.tokenizer import tokenize
from snapfusion.noise import gaussian, noise_key, step_noise

RUNTIMES = {"executorch": EXECUTORCH, "onnx": ONNX_RUNTIME}
"""Runtimes on any machine: as an option names them, and as a manifest does."""
_SETTINGS = {"executorch": 'mobile.executorch=["float32"]', "onnx": 'mobile.onnx=["float32"]'}


def default_variant(bundle: MobileBundle, *, runtime: str | None) -> str:
    """The first variant that runs here, by a runtime of `RUNTIMES`; None prefers ExecuTorch.

    Raises:
        BundleError: if there is none.
    """
    names = [runtime] if runtime else [*RUNTIMES]
    runnable = [variant for name in names for variant in bundle.variants(runtime=RUNTIMES[name])]
    if not runnable:
        raise BundleError(
            f"{bundle.folder} has no {RUNTIMES[names[0]]} programs that run here; compile some with "
            f"--set {_SETTINGS[names[0]]}"
        )
    return runnable[0]


def generate_bundle_images(
    bundle: MobileBundle,
    programs: CompiledModel,
    caption: str,
    *,
    guidance: float | None,
    seed: int,
    count: int,
    negative: str = "",
    on_step: OnStep | None = None,
) -> list[np.ndarray]:
    """Generate `count` images of a caption, uint8 [H,W,3]; black if the safety checker marks one.

    Args:
        bundle: with the sampler and the tokenizer.
        programs: of one of its variants.
        caption: to generate.
        guidance: w of Eq. 3; None takes the bundle's.
        seed: of the noise.
        count: number of images.
        negative: caption of the unconditional input; "" as in the paper.
        on_step: called after each step of an image; None shows a bar.

    Raises:
        NonFiniteImageError: if an image has values that are NaN or infinite.
    """
    sampler, checker = bundle.sampler, bundle.safety_checker
    w = guidance or sampler.guidance
    ids = tokenize(bundle.tokenizer, [negative, caption]).numpy().astype(np.int32)
    c = encode_text(programs, ids=ids)
    images = []
    with tqdm(total=count * len(sampler.steps), unit="step", disable=on_step is not None) as bar:
        for index in range(count):
            key = noise_key(seed, caption, index)
            latent = gaussian(key, bundle.latent_shape)[None].numpy()
            fresh = fresh_noise(key, bundle.latent_shape)
            steps = sampling_steps(programs, c=c, noise=latent, sampler=sampler, w=w, fresh_noise=fresh)
            for number, step in enumerate(steps, start=1):
                latent = step.z_next
                bar.update()
                if on_step is not None:
                    on_step(number)
            image = programs.decoder([latent])
            if not np.isfinite(image).all():
                raise NonFiniteImageError
            if checker is not None and float(checker([image]).ravel()[0]) > 0.0:
                logger.info(f"image {index} is not shown: the bundle's safety checker marks it")
                image = np.zeros_like(image)
            images.append(to_uint8_image(image))
    return images


def fresh_noise(key: int, shape: tuple[int, int, int]) -> FreshNoise:
    """The noise that a step adds to the image of a key, as `snapfusion generate` draws it from a model."""
    noise = step_noise([key], shape, device=torch.device("cpu"))
    return lambda t: noise(t).numpy()
