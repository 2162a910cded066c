"""Generators of images for `jobs.generate`: a model in torch, or the programs of a mobile bundle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jobs.evaluation.bundle_images import default_variant, generate_bundle_images
from jobs.evaluation.image_files import GeneratedImage, Origin
from jobs.evaluation.images import (
    StartImage,
    distillation_mismatch,
    generate_images,
    has_unconditional_input,
    warn_of_caption,
)
from jobs.runtime.logs import logger
from pipelines.rejections import Rejected
from pipelines.stages.crop import check_size
from pipelines.stages.image import decode_image
from pipelines.stages.settings import ImageBounds
from snapfusion.export.bundle import open_bundle
from snapfusion.export.bundle_files import BundleError
from snapfusion.models.bundle import Bundle
from snapfusion.models.defaults import default_guidance, distilled_solver, distilled_steps, sampling_grid
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load
from snapfusion.models.safety_checker import SafetyChecker, find_safety_checker, read_safety_checker
from snapfusion.settings import SettingsError
from snapfusion.solver_names import Solver

_MODEL, _STRENGTH = "mini", 0.8


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Generates images of a caption.

    Attributes:
        pixels: a function of a caption, `seed` and `count` to images, uint8 [H,W,3].
        origin: what all its images are made with.
        description: of steps and sampler, for the log.
        safety_checker: of the model; None if it has none, or it is turned off.
    """

    pixels: Callable[..., Sequence[np.ndarray]]
    origin: Origin
    description: str
    safety_checker: SafetyChecker | None = None

    def images(self, caption: str, *, seed: int, count: int) -> list[GeneratedImage]:
        """Generate `count` images of a caption, with how each was made; marked ones are black."""
        images = self.pixels(caption, seed=seed, count=count)
        flags = self.safety_checker.flags(images) if self.safety_checker else [False] * len(images)
        return [
            GeneratedImage(
                pixels=np.zeros_like(pixels) if flagged else pixels,
                caption=caption,
                seed=seed,
                index=index,
                origin=self.origin,
                flagged=flagged,
            )
            for index, (pixels, flagged) in enumerate(zip(images, flags, strict=True))
        ]


def model_generator(options: SimpleNamespace, captions: Sequence[str]) -> Generator:
    """Load a model, and bind its options.

    Args:
        options: of the command line.
        captions: to be generated, of which those are marked that the model does not know.

    Raises:
        SettingsError: if the model cannot be loaded or does not accept an option.
    """
    source, device = options.model or _MODEL, options.device or "cpu"
    bundle = _load(source, device=device)
    safety_checker = _safety_checker(source, device=device, use=not options.no_safety_checker)
    guidance = default_guidance(bundle) if options.guidance is None else options.guidance
    solver: Solver = options.sampler or distilled_solver(bundle)
    steps = distilled_steps(bundle) if options.steps is None else options.steps
    try:
        sampling_grid(bundle, steps=steps, solver=solver)
    except ValueError as error:
        raise SettingsError(f"--steps {steps}: {error}") from None
    if options.size is not None:
        check_size(options.size, step=bundle.granularity, option="--size")
        bundle.resize(options.size)
    if options.negative and not has_unconditional_input(bundle, guidance=guidance):
        raise SettingsError(
            f"--negative {options.negative!r}: this model takes none at guidance {guidance:g}"
        )
    if note := distillation_mismatch(bundle, steps=steps, solver=solver, guidance=guidance):
        logger.warning(f"{source}: {note}")
    for caption in captions:
        warn_of_caption(bundle.tokenizer, caption)
    start = _start_image(options, size=bundle.image_size)

    def pixels(caption: str, *, seed: int, count: int) -> list[np.ndarray]:
        sampling = {"steps": steps, "guidance": guidance, "solver": solver, "negative": options.negative}
        return generate_images(bundle, [caption], seed=seed, count=count, start=start, **sampling)

    origin = Origin(negative=options.negative, steps=steps, sampler=solver, guidance=guidance, model=source)
    description = f"{steps} steps of {solver}"
    return Generator(pixels=pixels, origin=origin, description=description, safety_checker=safety_checker)


def bundle_generator(options: SimpleNamespace, captions: Sequence[str]) -> Generator:
    """Open a mobile bundle, and bind its options; arguments and errors as of `model_generator`."""
    try:
        bundle = open_bundle(Path(options.bundle))
        variant = options.variant or default_variant(bundle, runtime=options.runtime)
        programs, steps = bundle.programs(variant), len(bundle.sampler.steps)
    except BundleError as error:
        raise SettingsError(f"--bundle {error}") from None
    folded = bundle.manifest.get("folded_guidance")
    if folded is not None and (options.guidance is not None or options.negative):
        option = (
            f"--negative {options.negative!r}" if options.negative else f"--guidance {options.guidance:g}"
        )
        raise SettingsError(f"{option}: guidance {folded:g} is compiled into this bundle")
    guidance = bundle.sampler.guidance if options.guidance is None else options.guidance
    for caption in captions:
        warn_of_caption(bundle.tokenizer, caption)
    pixels = partial(generate_bundle_images, bundle, programs, guidance=guidance, negative=options.negative)
    origin = Origin(
        negative=options.negative,
        steps=steps,
        sampler=bundle.sampler.solver,
        guidance=guidance if folded is None else folded,
        model=options.bundle,
    )
    return Generator(pixels=pixels, origin=origin, description=f"{steps} steps of {variant}")


def _load(source: str, *, device: str) -> Bundle:
    try:
        bundle = load(source)
    except ValueError as error:
        raise SettingsError(f"--model {source}: {str(error).removeprefix(f'{source}: ')}") from None
    try:
        return bundle.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, of a device that it does not know or have
        raise SettingsError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _safety_checker(source: str, *, device: str, use: bool) -> SafetyChecker | None:
    """Load the safety checker of a model that has one, and say whether it is used."""
    folder = find_safety_checker(source)
    if folder is None or not use:
        if folder is not None:
            logger.info("the model's safety checker is off")
        return None
    try:
        checker = read_safety_checker(folder, source=source)
    except ModelError as error:
        raise SettingsError(f"--model {error}; --no-safety-checker generates without it") from None
    logger.info("the model's safety checker is used; --no-safety-checker turns it off")
    checker.network.to(device)
    return checker


def _start_image(options: SimpleNamespace, *, size: int) -> StartImage | None:
    """Read --image, cropped to its central square and resized."""
    if options.image is None:
        return None
    try:
        data = Path(options.image).read_bytes()
        pixels = decode_image(data, size=size, settings=ImageBounds(min_side=2))
    except OSError as error:
        raise SettingsError(f"--image {options.image}: {error.strerror or error}") from None
    except Rejected as error:
        raise SettingsError(f"--image {options.image}: {error}") from None
    return StartImage(pixels=pixels, strength=options.strength or _STRENGTH)
