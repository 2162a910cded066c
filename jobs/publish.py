"""Publish a saved model in a repository on a hub, with a card of its origin, sampler, figures and licence.

MODEL is a diffusers folder or the folder of a training, REPO is OWNER/NAME. The token is the one that
`hf auth login` has stored, or HF_TOKEN.
"""

from pathlib import Path

import click

from jobs.cli.verb import DRY_RUN, Options, plain_verb
from jobs.runtime.logs import logger

OPTIONS = [
    click.Argument(["model"], metavar="MODEL"),
    click.Argument(["repository"], metavar="REPO"),
    click.Option(["--licence"], metavar="NAME", help="of the weights (default: the one in the model's card)"),
    click.Option(["--licence-file"], type=Path, metavar="FILE", help="its text, which RAIL licences require"),
    click.Option(["--private"], is_flag=True, help="make a new repository private"),
    click.Option(["--message"], default="Add the model", help="of the commit"),
    DRY_RUN,
]


def _publish(options: Options) -> None:
    from jobs.publishing.hub_upload import check_repository, check_token, upload

    check_repository(options.repository)
    if not options.dry_run:
        check_token()

    # Only now: these take seconds.
    from jobs.publishing.publication import publication

    found = publication(
        options.model,
        repository=options.repository,
        licence=options.licence,
        licence_file=options.licence_file,
    )
    logger.info("\n".join([f"{options.model} -> {options.repository}", *found.lines()]))
    if options.dry_run:
        logger.info(f"\nREADME.md:\n\n{found.card}")
        return
    url = upload(found.files, repository=options.repository, private=options.private, message=options.message)
    logger.info(f"published: {url}")


main = plain_verb("publish", _publish, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
