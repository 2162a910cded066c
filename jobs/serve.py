"""Serve the page of a mobile bundle, which draws from a caption in a browser, on this machine only.

The page runs the bundle's ONNX models by onnxruntime-web, which `make web` fetches.
"""

import errno
from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb
from jobs.runtime.logs import logger
from snapfusion.settings import SettingsError

OPTIONS = [
    click.Option(["--bundle"], type=Path, required=True, metavar="DIR", help="a mobile bundle"),
    click.Option(
        ["--port"], type=click.IntRange(0, 65535), default=8000, help="to listen at; 0 for any free one"
    ),
    click.Option(
        ["--onnxruntime-web"],
        type=Path,
        metavar="DIR",
        help="its folder dist (default: that in the bundle, else that of make web)",
    ),
]


def _serve(options: Options) -> None:
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.serving.bundle_page import FRONT, page_files
    from jobs.serving.site import Site

    files = page_files(options.bundle, runtime=options.onnxruntime_web)
    try:
        site = Site(files, front=FRONT, port=options.port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise SettingsError(
            f"--port {options.port}: {(error.strerror or '').lower()}; give another, or 0 for any free one"
        ) from None
    with site:
        logger.info(f"{site.url} draws by {options.bundle}; Ctrl-C ends it")
        site.serve_forever()


main = plain_verb("serve", _serve, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
