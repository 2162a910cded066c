"""Serve a page that generates images, on this machine only: by models side by side, or by a bundle alone.

With MODEL, a page and a JSON API compare models, and the bundle if there is one, from the same noise on this
machine. Without, the bundle's own page runs its ONNX models in the browser, by onnxruntime-web, which `make
web` fetches.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb
from jobs.runtime.logs import logger
from snapfusion.settings import SettingsError

OPTIONS = [
    click.Argument(["model"], nargs=-1),
    click.Option(["--bundle"], metavar="DIR", help="a mobile bundle: beside MODEL, or its own page"),
    click.Option(["--variant"], help="of the bundle beside MODEL (default: the first that runs here)"),
    click.Option(["--device"], help="of each MODEL, such as cuda (default: cpu)"),
    click.Option(["--max-steps"], type=click.IntRange(1), help="of an image by MODEL (default: 100)"),
    click.Option(
        ["--max-size"],
        type=click.IntRange(1),
        help="of an image by MODEL, in pixels (default: twice its own)",
    ),
    click.Option(
        ["--max-waiting"], type=click.IntRange(0), help="requests for MODEL that may wait (default: 8)"
    ),
    click.Option(
        ["--no-safety-checker"], is_flag=True, help="show what the safety checker of a MODEL would not"
    ),
    click.Option(
        ["--port"], type=click.IntRange(0, 65535), default=8000, help="to listen at; 0 for any free one"
    ),
    click.Option(
        ["--onnxruntime-web"],
        type=Path,
        metavar="DIR",
        help="its folder dist, for a bundle's own page (default: in the bundle, else that of make web)",
    ),
]
_OF_A_MODEL = ("variant", "device", "max_steps", "max_size", "max_waiting", "no_safety_checker")


def _serve(options: Options) -> None:
    _check_options(options)
    # Each imports what it needs, so that --help and mistakes are answered at once.
    (_serve_comparison if options.model else _serve_page)(options)


def _check_options(options: Options) -> None:
    if not options.model and options.bundle is None:
        raise SettingsError("give a MODEL, such as mini, to compare models, or --bundle DIR for its page")
    unused = ("onnxruntime_web",) if options.model else _OF_A_MODEL
    for name in unused:
        if getattr(options, name) not in (None, False):
            case = "without" if options.model else "with"
            raise SettingsError(f"--{name.replace('_', '-')}: it has an effect {case} MODEL only")


def _serve_comparison(options: Options) -> None:
    from snapfusion.export.installed import check_installed

    for package in ("starlette", "uvicorn"):
        check_installed(package, extra="serve")
    from jobs.serving.comparison_app import comparison_app
    from jobs.serving.loopback import listening, url_of, uvicorn_server
    from jobs.serving.opening import limits_of, open_models

    with _port_errors(options.port), listening(options.port) as server:
        models, limits = open_models(options), limits_of(options)
        names = ", ".join(model.loaded.source for model in models)
        logger.info(f"{url_of(server)} generates by {names}; Ctrl-C ends it")
        uvicorn_server(comparison_app(models, limits=limits)).run(sockets=[server])


def _serve_page(options: Options) -> None:
    from jobs.serving.bundle_page import FRONT, page_files
    from jobs.serving.site import Site

    files = page_files(Path(options.bundle), runtime=options.onnxruntime_web)
    with _port_errors(options.port), Site(files, front=FRONT, port=options.port) as site:
        logger.info(f"{site.url} draws by {options.bundle}; Ctrl-C ends it")
        site.serve_forever()


@contextmanager
def _port_errors(port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES) or error.filename is not None:
            raise
        raise SettingsError(
            f"--port {port}: {os.strerror(error.errno).lower()}; give another, or 0 for any free one"
        ) from None


main = plain_verb("serve", _serve, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
