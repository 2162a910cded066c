"""Generate images of captions: by a model in torch, or by the programs of a mobile bundle alone."""

import math
import time
from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb
from jobs.runtime.logs import logger
from snapfusion.settings import SettingsError
from snapfusion.solver_names import SOLVERS

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
OPTIONS = [
    click.Argument(["caption"], nargs=-1),
    click.Option(["--prompts"], metavar="FILE", help="a list of captions, in place of CAPTION"),
    click.Option(["--caption-column"], metavar="NAME", help="of --prompts (default: found by its name)"),
    click.Option(["--model"], help="mini, mini-v, a folder, file, URL or hub id (default: mini)"),
    click.Option(["--bundle"], metavar="DIR", help="a mobile bundle, whose ExecuTorch programs are used"),
    click.Option(["--variant"], help="of the bundle (default: the first of its ExecuTorch variants)"),
    click.Option(["--device"], help="of the model, such as cuda (default: cpu)"),
    click.Option(["--steps"], type=click.IntRange(1), help="default: those it was distilled for, else 50"),
    click.Option(["--sampler"], type=click.Choice(SOLVERS), help="default: ddim"),
    click.Option(
        ["--guidance"],
        type=float,
        help="w of Eq. 3; 1 is none (default: the model's: 2.5 of miniatures, else 7.5)",
    ),
    click.Option(["--negative"], default="", help="caption to guide away from"),
    click.Option(["--image"], metavar="FILE", help="an image to begin with in place of noise"),
    click.Option(
        ["--strength"],
        type=click.FloatRange(0, 1, min_open=True),
        help="part of the steps after --image (0.8)",
    ),
    click.Option(["--size"], type=int, help="side of the image in pixels (default: the model's own)"),
    click.Option(["--seed"], type=int, default=0, help="of the noise"),
    click.Option(["--seeds"], metavar="N,N,...", help="several seeds, in place of --seed"),
    click.Option(["-n"], type=click.IntRange(1), default=1, help="images of each caption and seed"),
    click.Option(["--sheet"], is_flag=True, help="all images in one file, a row for each caption"),
    click.Option(["--out"], default="image.png", help=f"a file ({', '.join(_ENDINGS)}); none is overwritten"),
]
_OF_A_MODEL = ("model", "steps", "sampler", "size", "device", "image")


def _generate(options: Options) -> None:
    captions, seeds = _captions(options), _seeds(options)
    _check(options)
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.generators import bundle_generator, model_generator
    from jobs.evaluation.image_files import describe_size, save_images

    generator = (model_generator if options.bundle is None else bundle_generator)(options, captions)
    began = time.monotonic()
    images = [
        image
        for caption in captions
        for seed in seeds
        for image in generator.images(caption, seed=seed, count=options.n)
    ]
    seconds = time.monotonic() - began
    try:
        files = save_images(images, Path(options.out), sheet=options.sheet)
    except OSError as error:
        raise SettingsError(f"--out {options.out}: {error.strerror or error}") from error
    names = str(files[0]) if len(files) == 1 else f"{files[0]} .. {files[-1].name}"
    made = f"{describe_size(images)}, {generator.description}"
    logger.info(f"{names}: {made}, {seconds:.1f} s after loading")


def _captions(options: Options) -> list[str]:
    """The caption of the command line, or those of a file."""
    if bool(options.caption) == bool(options.prompts):
        raise SettingsError("give a CAPTION or --prompts FILE, one of them")
    if options.caption:
        return [" ".join(options.caption)]
    from pipelines.rejections import Rejection
    from pipelines.sources.captions import read_captions
    from pipelines.sources.settings import CaptionSettings

    rows = read_captions(options.prompts, CaptionSettings(caption_column=options.caption_column))
    captions = list(dict.fromkeys(row.text for row in rows if not isinstance(row, Rejection)))
    if not captions:
        raise SettingsError(f"--prompts {options.prompts}: it has no usable caption")
    return captions


def _seeds(options: Options) -> list[int]:
    if options.seeds is None:
        return [options.seed]
    try:
        return list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise SettingsError(f"--seeds {options.seeds}: whole numbers with commas are accepted") from None


def _check(options: Options) -> None:
    """Refuse options out of range or without effect."""
    if Path(options.out).suffix.lower() not in _ENDINGS:
        raise SettingsError(f"--out {options.out}: a file that ends with {', '.join(_ENDINGS)} is accepted")
    if options.guidance is not None and not 1.0 <= options.guidance < math.inf:
        raise SettingsError(f"--guidance {options.guidance}: 1.0 and more is accepted")
    if options.caption_column is not None and options.prompts is None:
        raise SettingsError(f"--caption-column {options.caption_column}: only --prompts FILE has columns")
    if options.bundle is None and options.variant is not None:
        raise SettingsError(f"--variant {options.variant}: only a --bundle has variants")
    if options.strength is not None and options.image is None:
        raise SettingsError(f"--strength {options.strength}: it has an effect with --image only")
    if options.bundle is not None:
        for name in _OF_A_MODEL:
            if (value := getattr(options, name)) is not None:
                raise SettingsError(f"--{name} {value}: a --bundle has its own, compiled into it")


main = plain_verb("generate", _generate, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
