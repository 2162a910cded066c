"""The `snapfusion` command, which runs any job by its verb."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import click

from jobs.cli.groups import GROUPS
from jobs.cli.verb import Verb, parse
from jobs.runtime.exit_codes import exit_process, run_guarded
from jobs.runtime.secrets import refuse_secrets_in_options
from snapfusion.settings import SettingsError

VERBS = sorted(verb.replace("-", "_") for verbs in GROUPS.values() for verb in verbs)

EPILOG = (
    "Every verb has its own --help. Exit codes: 0 done, 1 the work failed and a second try may help, 2 the "
    "request cannot be carried out as it stands, 130 interrupted, 143 terminated. Completion in bash: "
    'eval "$(_SNAPFUSION_COMPLETE=bash_source snapfusion)"; zsh and fish likewise.'
)


class _Verbs(click.Group):
    """Imports the module of a verb only when its options are needed, as for completion."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all verbs, with hyphens."""
        return [verb.replace("_", "-") for verb in VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The options of a verb; None if there is no such verb."""
        verb = cmd_name.replace("-", "_")
        return load(verb).command if verb in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs by group, with one line each."""
        for group, verbs in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl(list(verbs.items()), col_spacing=1)


GROUP = _Verbs(
    "snapfusion",
    help="Distils Stable Diffusion into a model for phones: data, training, evaluation, compilation.",
    epilog=EPILOG,
)
click.version_option(
    package_name="snapfusion-ray",
    prog_name="snapfusion",
    message="%(prog)s %(version)s",
    help="print the version",
)(GROUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_SNAPFUSION_COMPLETE" in os.environ:
        GROUP.main(arguments, "snapfusion")
    verb = arguments[0].replace("-", "_") if arguments else ""
    if verb in VERBS:
        return load(verb)(arguments[1:], program=f"snapfusion {arguments[0]}")
    return run_guarded("snapfusion", lambda: _help_or_refuse(arguments))


def load(verb: str) -> Verb:
    """The command of a verb."""
    module = "jobs.recipes.__main__" if verb == "recipes" else f"jobs.{verb}"
    found: Verb = importlib.import_module(module).main
    return found


def _help_or_refuse(arguments: Sequence[str]) -> None:
    refuse_secrets_in_options(arguments)
    if arguments and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0].replace("-", "_"), VERBS, n=1)
        hint = f"did you mean {near[0].replace('_', '-')}?" if near else "`snapfusion --help` lists them"
        raise SettingsError(f"there is no verb {arguments[0]}; {hint}")
    parse(GROUP, arguments or ["--help"], program="snapfusion")


def entry() -> None:
    """Entry point of the installed command."""
    exit_process(main())


if __name__ == "__main__":
    entry()
