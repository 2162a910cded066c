"""Export a model for other programs: as one file with LDM keys, which is read back before it is published.

Nothing is overwritten.
"""

from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb

OPTIONS = [
    click.Argument(["model"], metavar="MODEL"),
    click.Option(["--to"], type=click.Choice(["single-file"]), required=True, help="form"),
    click.Option(["--out"], required=True, help="a new .safetensors file"),
]


def _export(options: Options) -> None:
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.publishing.single_file import export_single_file

    export_single_file(options.model, Path(options.out))


main = plain_verb("export", _export, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
