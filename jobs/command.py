"""The `snapfusion` command, which runs any job by its verb."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import jobs
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import exit_process, run_guarded

VERBS = sorted(module.name for module in pkgutil.iter_modules(jobs.__path__) if not module.ispkg)
VERBS.remove("command")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0].replace("-", "_") if arguments else ""
    if verb in VERBS:
        entry = importlib.import_module(f"jobs.{verb}")
        return int(entry.main(arguments[1:]))
    return run_guarded("snapfusion", lambda: _refuse(arguments))


def _refuse(arguments: Sequence[str]) -> None:
    parser = OneLineParser(
        prog="snapfusion",
        description="Generate an image, check or time a mobile bundle, or run a job.",
        epilog="Every verb has its own --help.",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    parser.options(arguments)


def entry() -> None:
    """Entry point of the installed command."""
    exit_process(main())


if __name__ == "__main__":
    exit_process(main())
