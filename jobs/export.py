"""Export a model for other programs: as one file with LDM keys, or for Apple's ml-stable-diffusion.

Both are compared with the model before they are published, and neither overwrites anything.
"""

from pathlib import Path
from typing import get_args

import click

from jobs.cli.verb import Options, plain_verb
from snapfusion.export.settings import AppleSettings, CoreMLKind
from snapfusion.settings import SettingsError

SINGLE_FILE, APPLE = "single-file", "apple"
_OF_APPLE = ("decoder", "weights", "conditions", "caption", "steps", "guidance")
"""Options without effect on a single file."""

OPTIONS = [
    click.Argument(["model"], metavar="MODEL"),
    click.Option(["--to"], type=click.Choice([SINGLE_FILE, APPLE]), required=True, help="form"),
    click.Option(["--out"], required=True, help="a new .safetensors file, or for Apple a new folder"),
    click.Option(["--decoder"], metavar="URL", help="Apple: half-width decoder (default: the model's own)"),
    click.Option(
        ["--weights"], type=click.Choice(get_args(CoreMLKind)), help="Apple: of the packages (float16)"
    ),
    click.Option(["--conditions"], type=click.IntRange(1, 2), help="Apple: in one call of the UNet (2)"),
    click.Option(["--caption"], help="Apple: of the image that is compared with torch"),
    click.Option(["--steps"], type=click.IntRange(1), help="Apple: likewise (default: the model's)"),
    click.Option(["--guidance"], type=float, help="Apple: likewise (default: the model's)"),
]


def _export(options: Options) -> None:
    if not options.out or "://" in options.out:
        raise SettingsError(f"--out {options.out!r}: a new file or folder on this machine is accepted")
    given = {name: getattr(options, name) for name in _OF_APPLE if getattr(options, name) is not None}
    if options.to == SINGLE_FILE:
        if given:
            name = next(iter(given))
            raise SettingsError(f"--{name} {given[name]}: it has an effect with --to {APPLE} only")
        # Imported here, so that --help and mistakes are answered at once.
        from jobs.publishing.single_file import export_single_file

        export_single_file(options.model, Path(options.out))
        return
    decoder = given.pop("decoder", None)
    try:
        settings = AppleSettings.parse(given)
    except SettingsError as error:
        raise SettingsError(f"--{error}") from None

    from jobs.publishing.apple_layout import export_apple

    export_apple(options.model, Path(options.out), decoder=decoder, settings=settings)


main = plain_verb("export", _export, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
