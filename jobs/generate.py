"""Draw a caption: by a model in torch, or by the programs of a mobile bundle alone."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import run_guarded
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    import numpy as np

    from snapfusion.export.bundle import MobileBundle
    from snapfusion.export.loop import CompiledModel
    from snapfusion.export.sampler_coefficients import SamplerCoefficients
    from snapfusion.models.bundle import Bundle
    from snapfusion.solver_names import Solver

SAMPLERS = ("ddim", "euler", "dpm", "dpm++")
"""Those of `snapfusion.solvers`, which takes seconds to import."""

_MODEL, _GUIDANCE = "mini", 2.5
_SAMPLER: Solver = "ddim"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion generate`."""

    def work() -> None:
        options = _parser().options(argv)
        _check(options)
        if options.bundle is None:
            _generate_with_model(options)
        else:
            _generate_with_bundle(options)

    return run_guarded("snapfusion", work)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="snapfusion generate", description=(__doc__ or "").strip())
    parser.add_argument("caption", help='for example "a large red circle at the top on a white background"')
    parser.add_argument("--model", help=f"mini, mini-v, a folder, its URL or a hub id (default: {_MODEL})")
    parser.add_argument("--bundle", metavar="DIR", help="a mobile bundle, whose ExecuTorch programs draw")
    parser.add_argument("--variant", help="of the bundle (default: the first of its ExecuTorch variants)")
    parser.add_argument("--steps", type=int, help="default: those that the model was distilled for, else 50")
    parser.add_argument("--sampler", choices=SAMPLERS, help=f"default: {_SAMPLER}")
    parser.add_argument(
        "--guidance", type=float, help=f"w of Eq. 3; 1 is none (default: {_GUIDANCE}, or the bundle's)"
    )
    parser.add_argument("--size", type=int, help="side of the picture in pixels (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("-n", type=int, default=1, help="how many pictures, side by side (default: 1)")
    parser.add_argument("--out", default="picture.png", help="a PNG file (default: picture.png)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what nothing can draw."""
    for option, given in (("-n", options.n), ("--steps", options.steps)):
        if given is not None and given < 1:
            raise SettingsError(f"{option} {given}: at least 1 is accepted")
    if options.guidance is not None and not 1.0 <= options.guidance < math.inf:
        raise SettingsError(f"--guidance {options.guidance}: 1.0 and more is accepted")
    if options.bundle is None and options.variant is not None:
        raise SettingsError(f"--variant {options.variant}: only a --bundle has variants")
    if options.bundle is not None:
        for name in ("model", "steps", "sampler", "size"):
            if (given := getattr(options, name)) is not None:
                raise SettingsError(f"--{name} {given}: a --bundle has its own, compiled into it")


def _generate_with_model(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistake answer at once.
    from jobs.evaluation.images import distillation_mismatch, distilled_steps, generate_images
    from pipelines.stages.crop import check_size

    source = options.model or _MODEL
    solver: Solver = options.sampler or _SAMPLER
    guidance = options.guidance or _GUIDANCE
    bundle = _load(source)
    steps = distilled_steps(bundle) if options.steps is None else options.steps
    if steps > bundle.schedule.num_steps:
        raise SettingsError(f"--steps {steps}: 1 to {bundle.schedule.num_steps} is accepted by this model")
    if options.size is not None:
        check_size(options.size, step=bundle.granularity, option="--size")
        bundle.resize(options.size)
    if told := distillation_mismatch(bundle, steps=steps, solver=solver, guidance=guidance):
        print(f"{source}: {told}")
    began = time.monotonic()
    pictures = generate_images(
        bundle,
        [options.caption],
        seed=options.seed,
        count=options.n,
        steps=steps,
        solver=solver,
        guidance=guidance,
    )
    _save(pictures, options, by=f"{steps} steps of {solver}", took=time.monotonic() - began)


def _load(source: str) -> Bundle:
    from snapfusion.models.load import load

    try:
        return load(source)
    except ValueError as error:
        raise SettingsError(f"--model {source}: {str(error).removeprefix(f'{source}: ')}") from None


def _generate_with_bundle(options: argparse.Namespace) -> None:
    from snapfusion.export.bundle import BundleError, open_bundle

    try:
        bundle = open_bundle(Path(options.bundle))
        variant = options.variant or _default_variant(bundle)
        programs = bundle.programs(variant)
        steps = bundle.steps
    except BundleError as error:
        raise SettingsError(f"--bundle {error}") from None
    began = time.monotonic()
    pictures = _run_programs(bundle, programs, steps=steps, options=options)
    _save(pictures, options, by=f"{len(steps.steps)} steps of {variant}", took=time.monotonic() - began)


def _default_variant(bundle: MobileBundle) -> str:
    from snapfusion.export.bundle import EXECUTORCH, BundleError

    runnable = bundle.variants(runtime=EXECUTORCH)
    if not runnable:
        raise BundleError(
            f"{bundle.folder} has no ExecuTorch programs that run here; compile one with XNNPACK"
        )
    return runnable[0]


def _run_programs(
    bundle: MobileBundle, programs: CompiledModel, *, steps: SamplerCoefficients, options: argparse.Namespace
) -> list[np.ndarray]:
    import numpy as np
    from tqdm import tqdm

    from snapfusion.export.loop import encode_text, sampling_steps, to_uint8_image
    from snapfusion.models.tokenizer import tokenize
    from snapfusion.noise import gaussian, noise_key

    checker = bundle.safety_checker()
    w = options.guidance or steps.guidance
    ids = tokenize(bundle.tokenizer, ["", options.caption]).numpy().astype(np.int32)
    c = encode_text(programs, ids=ids)
    pictures = []
    with tqdm(total=options.n * len(steps.steps), unit="step") as bar:
        for number in range(options.n):
            latent = gaussian(noise_key(options.seed, options.caption, number), bundle.latent_shape)[
                None
            ].numpy()
            for moment in sampling_steps(programs, c=c, noise=latent, steps=steps, w=w):
                latent = moment.z_next
                bar.update()
            image = programs.decoder([latent])
            if checker is not None and float(checker([image]).ravel()[0]) > 0.0:
                print(f"picture {number} is not shown: the bundle's safety checker marks it")
                image = np.zeros_like(image)
            pictures.append(to_uint8_image(image))
    return pictures


def _save(pictures: Sequence[np.ndarray], options: argparse.Namespace, *, by: str, took: float) -> None:
    from jobs.evaluation.images import save_images

    try:
        factor = save_images(pictures, Path(options.out))
    except OSError as error:
        raise SettingsError(f"--out {options.out}: {error.strerror or error}") from None
    shown = f", shown {factor} times larger" if factor > 1 else ""
    size = pictures[0].shape[0]
    print(f"{options.out}: {options.n} of {size} px{shown}, {by}, {took:.1f} s after loading")
