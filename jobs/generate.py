"""Generate images of captions: by a model in torch, or by the programs of a mobile bundle alone."""

import time
from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb
from jobs.evaluation.generation_options import ENDINGS, check_options, read_captions, read_seeds
from jobs.runtime.logs import logger
from snapfusion.settings import SettingsError
from snapfusion.solver_names import SOLVERS

OPTIONS = [
    click.Argument(["caption"], nargs=-1),
    click.Option(["--prompts"], metavar="FILE", help="a list of captions, in place of CAPTION"),
    click.Option(["--caption-column"], metavar="NAME", help="of --prompts (default: found by its name)"),
    click.Option(["--model"], help="mini, mini-v, a folder, file, URL or hub id (default: mini)"),
    click.Option(["--bundle"], metavar="DIR", help="a mobile bundle, whose programs are used"),
    click.Option(
        ["--runtime"], type=click.Choice(["executorch", "onnx"]), help="of the bundle (default: executorch)"
    ),
    click.Option(["--variant"], help="of the bundle (default: the first of its runtime)"),
    click.Option(["--device"], help="of the model, such as cuda (default: cpu)"),
    click.Option(["--steps"], type=click.IntRange(1), help="default: those it was distilled for, else 50"),
    click.Option(["--sampler"], type=click.Choice(SOLVERS), help="default: the model's, or ddim"),
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
    click.Option(
        ["--no-safety-checker"], is_flag=True, help="show what the model's safety checker would not"
    ),
    click.Option(["--sheet"], is_flag=True, help="all images in one file, a row for each caption"),
    click.Option(["--out"], default="image.png", help=f"a file ({', '.join(ENDINGS)}); none is overwritten"),
]


def _generate(options: Options) -> None:
    captions, seeds = read_captions(options), read_seeds(options)
    check_options(options)
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.generators import open_generator
    from jobs.evaluation.image_files import describe_size, save_images

    generator = open_generator(options, captions)
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
    if flagged := sum(image.flagged for image in images):
        logger.info(f"{flagged} of {len(images)} are black: the model's safety checker marks them")


main = plain_verb("generate", _generate, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
