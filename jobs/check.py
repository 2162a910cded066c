"""Check a model: what it is, what of it is read, what it costs, and what usually comes next.

It is loaded on the CPU as every job loads it, so what is refused here is refused there.
"""

import click

from jobs.cli.verb import Options, plain_verb
from jobs.runtime.logs import logger

OPTIONS = [
    click.Argument(["model"], metavar="MODEL"),
    click.Option(["--json"], is_flag=True, help="print one JSON object"),
]


def _check(options: Options) -> None:
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.model_check import check_model

    logger.info(check_model(options.model, as_json=options.json))


main = plain_verb("check", _check, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
