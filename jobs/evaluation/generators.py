"""Generators of images for `generate` and `serve`: a model in torch, or the programs of a mobile bundle.

A model is loaded once, and binds any number of options, each to a generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from transformers import CLIPTokenizer

from jobs.evaluation.bundle_images import default_variant, generate_bundle_images
from jobs.evaluation.image_files import GeneratedImage, Origin
from jobs.evaluation.images import (
    OnStep,
    StartImage,
    caption_warnings,
    distillation_mismatch,
    generate_images,
    has_unconditional_input,
)
from jobs.runtime.logs import logger
from pipelines.rejections import Rejected
from pipelines.stages.crop import check_size
from pipelines.stages.image import decode_image
from pipelines.stages.settings import ImageBounds
from snapfusion.export.bundle import MobileBundle, open_bundle
from snapfusion.export.bundle_files import BundleError
from snapfusion.export.loop import CompiledModel
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
        pixels: a function of a caption, `seed`, `count` and `on_step` to images, uint8 [H,W,3].
        origin: what all its images are made with.
        description: of steps and sampler, for the log.
        note: how they depart from what the model was distilled for; None if they do not.
        safety_checker: of the model; None if it has none, or it is turned off.
    """

    pixels: Callable[..., Sequence[np.ndarray]]
    origin: Origin
    description: str
    note: str | None = None
    safety_checker: SafetyChecker | None = None

    def images(
        self, caption: str, *, seed: int, count: int, on_step: OnStep | None = None
    ) -> list[GeneratedImage]:
        """Generate `count` images of a caption, with how each was made; marked ones are black.

        Args:
            caption: to generate from.
            seed: of the noise.
            count: number of images.
            on_step: called after each step.
        """
        images = self.pixels(caption, seed=seed, count=count, on_step=on_step)
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


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in torch.

    Attributes:
        source: that it was loaded from.
        bundle: the model.
        image_size: side of its images in pixels, unless options give another.
        safety_checker: that is used; None for none.
    """

    source: str
    bundle: Bundle
    image_size: int
    safety_checker: SafetyChecker | None

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """Of its captions."""
        return self.bundle.tokenizer

    def generator(self, options: SimpleNamespace) -> Generator:
        """Bind options.

        Args:
            options: `steps`, `sampler`, `guidance` and `size`, each None for the model's own; `negative`;
                `image`, None for none, and its `strength`.

        Raises:
            SettingsError: if the model does not accept one.
        """
        bundle = self.bundle
        guidance = default_guidance(bundle) if options.guidance is None else options.guidance
        solver: Solver = options.sampler or distilled_solver(bundle)
        steps = distilled_steps(bundle) if options.steps is None else options.steps
        size = self.image_size if options.size is None else options.size
        try:
            sampling_grid(bundle, steps=steps, solver=solver)
        except ValueError as error:
            raise SettingsError(f"--steps {steps}: {error}") from None
        check_size(size, step=bundle.granularity, option="--size")
        if options.negative and not has_unconditional_input(bundle, guidance=guidance):
            raise SettingsError(
                f"--negative {options.negative!r}: this model takes none at guidance {guidance:g}"
            )
        start = _start_image(options, size=size)
        sampling = {"steps": steps, "guidance": guidance, "solver": solver, "negative": options.negative}

        def pixels(caption: str, *, seed: int, count: int, on_step: OnStep | None = None) -> list[np.ndarray]:
            # The last images may have had another size.
            bundle.resize(size)
            return generate_images(
                bundle, [caption], seed=seed, count=count, start=start, on_step=on_step, **sampling
            )

        return Generator(
            pixels=pixels,
            origin=Origin(
                negative=options.negative, steps=steps, sampler=solver, guidance=guidance, model=self.source
            ),
            description=f"{steps} steps of {solver}",
            note=distillation_mismatch(bundle, steps=steps, solver=solver, guidance=guidance),
            safety_checker=self.safety_checker,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedPrograms:
    """One variant of a mobile bundle.

    Attributes:
        source: folder of the bundle.
        bundle: the bundle.
        variant: by name.
        programs: of the variant.
    """

    source: str
    bundle: MobileBundle
    variant: str
    programs: CompiledModel

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """Of its captions."""
        return self.bundle.tokenizer

    @property
    def folded_guidance(self) -> float | None:
        """w that is compiled into the programs; None if it is an option."""
        return self.bundle.manifest.get("folded_guidance")

    def generator(self, options: SimpleNamespace) -> Generator:
        """Bind `guidance`, None for the bundle's own, and `negative`; the bundle has its own for all others.

        Raises:
            SettingsError: if guidance is compiled into the programs.
        """
        folded, sampler = self.folded_guidance, self.bundle.sampler
        if folded is not None and (options.guidance is not None or options.negative):
            option = (
                f"--negative {options.negative!r}" if options.negative else f"--guidance {options.guidance:g}"
            )
            raise SettingsError(f"{option}: guidance {folded:g} is compiled into this bundle")
        guidance = sampler.guidance if options.guidance is None else options.guidance
        origin = Origin(
            negative=options.negative,
            steps=len(sampler.steps),
            sampler=sampler.solver,
            guidance=guidance if folded is None else folded,
            model=self.source,
        )
        sampling = {"guidance": guidance, "negative": options.negative}
        return Generator(
            pixels=partial(generate_bundle_images, self.bundle, self.programs, **sampling),
            origin=origin,
            description=f"{len(sampler.steps)} steps of {self.variant}",
        )


def open_generator(options: SimpleNamespace, captions: Sequence[str]) -> Generator:
    """Load the model or bundle of a command line, bind its options, and say what to expect of them.

    Args:
        options: of the command line.
        captions: to be generated, of which those are named that the model does not know.

    Raises:
        SettingsError: if the model cannot be loaded or does not accept an option.
    """
    loaded: LoadedModel | LoadedPrograms
    if options.bundle is None:
        source, device = options.model or _MODEL, options.device or "cpu"
        loaded = load_model(source, device=device, check_safety=not options.no_safety_checker)
    else:
        loaded = load_programs(options.bundle, variant=options.variant, runtime=options.runtime)
    generator = loaded.generator(options)
    if generator.note:
        logger.warning(f"{loaded.source}: {generator.note}")
    for caption in captions:
        for warning in caption_warnings(loaded.tokenizer, caption):
            logger.warning(warning)
    return generator


def load_model(source: str, *, device: str, check_safety: bool, option: str = "--model") -> LoadedModel:
    """Load a model.

    Args:
        source: as of `snapfusion.models.load.load`.
        device: such as "cpu" or "cuda".
        check_safety: whether a safety checker that it has is used.
        option: that names the model, for messages.

    Raises:
        SettingsError: if it cannot be loaded, or there is no such device.
    """
    try:
        bundle = load(source)
    except ValueError as error:
        raise SettingsError(f"{option} {source}: {str(error).removeprefix(f'{source}: ')}") from None
    try:
        bundle.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's, of a device that it does not know or have
        raise SettingsError(f"--device {device}: {str(error).splitlines()[0]}") from None
    checker = _safety_checker(source, device=device, use=check_safety, option=option)
    return LoadedModel(source=source, bundle=bundle, image_size=bundle.image_size, safety_checker=checker)


def load_programs(folder: str, *, variant: str | None, runtime: str | None = None) -> LoadedPrograms:
    """Open a variant of a mobile bundle; None for both takes the first that runs here.

    Raises:
        SettingsError: if it is no bundle, or has no such programs.
    """
    try:
        bundle = open_bundle(Path(folder))
        variant = variant or default_variant(bundle, runtime=runtime)
        programs = bundle.programs(variant)
        _ = bundle.sampler  # so that a damaged one is found now
    except BundleError as error:
        raise SettingsError(f"--bundle {error}") from None
    return LoadedPrograms(source=folder, bundle=bundle, variant=variant, programs=programs)


def _safety_checker(source: str, *, device: str, use: bool, option: str) -> SafetyChecker | None:
    """Load the safety checker of a model that has one, and say whether it is used."""
    folder = find_safety_checker(source)
    if folder is None or not use:
        if folder is not None:
            logger.info("the model's safety checker is off")
        return None
    try:
        checker = read_safety_checker(folder, source=source)
    except ModelError as error:
        raise SettingsError(f"{option} {error}; --no-safety-checker generates without it") from None
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
