"""Generate images of a caption: by a model in torch, or by the programs of a mobile bundle alone."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from jobs.cli.verb import Options, plain_verb
from jobs.runtime.logs import logger
from pipelines.stages.crop import check_size
from snapfusion.settings import SettingsError
from snapfusion.solver_names import SOLVERS, Solver

_MODEL, _GUIDANCE = "mini", 2.5
_SAMPLER: Solver = "ddim"
OPTIONS = [
    click.Argument(["caption"], nargs=-1, required=True),
    click.Option(
        ["--model"],
        help=f"mini, mini-v, a folder, a .safetensors file, a URL or a hub id (default: {_MODEL})",
    ),
    click.Option(["--bundle"], metavar="DIR", help="a mobile bundle, whose ExecuTorch programs are used"),
    click.Option(["--variant"], help="of the bundle (default: the first of its ExecuTorch variants)"),
    click.Option(
        ["--steps"], type=click.IntRange(1), help="default: those that the model was distilled for, else 50"
    ),
    click.Option(["--sampler"], type=click.Choice(SOLVERS), help=f"default: {_SAMPLER}"),
    click.Option(
        ["--guidance"], type=float, help=f"w of Eq. 3; 1 is none (default: {_GUIDANCE}, or the bundle's)"
    ),
    click.Option(["--size"], type=int, help="side of the image in pixels (default: the model's own)"),
    click.Option(["--seed"], type=int, default=0, help="of the noise"),
    click.Option(["-n"], type=click.IntRange(1), default=1, help="number of images, side by side"),
    click.Option(["--out"], default="image.png", help="a PNG file"),
]


def _generate(options: Options) -> None:
    options.caption = " ".join(options.caption)
    _check(options)
    generate, by = _by_model(options) if options.bundle is None else _by_bundle(options)
    began = time.monotonic()
    images = generate(seed=options.seed, count=options.n)
    seconds = time.monotonic() - began
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.images import save_images

    try:
        factor = save_images(images, Path(options.out))
    except OSError as error:
        raise SettingsError(f"--out {options.out}: {error.strerror or error}") from error
    enlarged = f", shown {factor} times larger" if factor > 1 else ""
    size = images[0].shape[0]
    logger.info(f"{options.out}: {options.n} of {size} px{enlarged}, {by}, {seconds:.1f} s after loading")


def _check(options: Options) -> None:
    """Refuse options out of range or without effect."""
    if options.guidance is not None and not 1.0 <= options.guidance < math.inf:
        raise SettingsError(f"--guidance {options.guidance}: 1.0 and more is accepted")
    if options.bundle is None and options.variant is not None:
        raise SettingsError(f"--variant {options.variant}: only a --bundle has variants")
    if options.bundle is not None:
        for name in ("model", "steps", "sampler", "size"):
            if (value := getattr(options, name)) is not None:
                raise SettingsError(f"--{name} {value}: a --bundle has its own, compiled into it")


def _by_model(options: Options) -> tuple[Callable[..., Sequence[Any]], str]:
    """Load the model; a function that generates its images, and a description of it."""
    from jobs.evaluation import images
    from snapfusion.models.load import load

    source, solver = options.model or _MODEL, options.sampler or _SAMPLER
    guidance = options.guidance or _GUIDANCE
    try:
        bundle = load(source)
    except ValueError as error:
        raise SettingsError(f"--model {source}: {str(error).removeprefix(f'{source}: ')}") from None
    steps = images.distilled_steps(bundle) if options.steps is None else options.steps
    if steps > bundle.schedule.num_steps:
        raise SettingsError(f"--steps {steps}: 1 to {bundle.schedule.num_steps} is accepted by this model")
    if options.size is not None:
        check_size(options.size, step=bundle.granularity, option="--size")
        bundle.resize(options.size)
    if note := images.distillation_mismatch(bundle, steps=steps, solver=solver, guidance=guidance):
        logger.warning(f"{source}: {note}")
    images.warn_of_caption(bundle.tokenizer, options.caption)
    generate = partial(
        images.generate_images, bundle, [options.caption], steps=steps, solver=solver, guidance=guidance
    )
    return generate, f"{steps} steps of {solver}"


def _by_bundle(options: Options) -> tuple[Callable[..., Sequence[Any]], str]:
    """The same of a mobile bundle's programs."""
    from jobs.evaluation.bundle_images import default_variant, generate_bundle_images
    from jobs.evaluation.images import warn_of_caption
    from snapfusion.export.bundle import BundleError, open_bundle

    try:
        bundle = open_bundle(Path(options.bundle))
        variant = options.variant or default_variant(bundle)
        programs, num_steps = bundle.programs(variant), len(bundle.sampler.steps)
    except BundleError as error:
        raise SettingsError(f"--bundle {error}") from None
    warn_of_caption(bundle.tokenizer, options.caption)
    generate = partial(generate_bundle_images, bundle, programs, options.caption, guidance=options.guidance)
    return generate, f"{num_steps} steps of {variant}"


main = plain_verb("generate", _generate, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
