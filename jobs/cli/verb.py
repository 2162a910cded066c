"""Declares the command of a verb: its options, its help, and how it runs and ends."""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NoReturn, TypeVar

import click

from jobs.cli.config_file import read_config
from jobs.cli.groups import FOLLOWING
from jobs.cli.job import Job, prepare_stores, resolve_recipe, save_settings, settings_lines
from jobs.cli.planned import planned_lines
from jobs.recipes.recipe import Recipe
from jobs.recipes.registry import RECIPES
from jobs.runtime.exit_codes import exit_process, run_guarded
from jobs.runtime.logs import log_as_json, logger
from jobs.runtime.progress import progress_display
from jobs.runtime.secrets import refuse_secrets_in_options
from pipelines.storage.objects import StorageError, check_table_url
from snapfusion.settings import Settings, SettingsError

Body = Callable[[Job], None]
Preview = Callable[[Job], list[str]]
Options = SimpleNamespace
"""Parsed options by their names, with underscores."""
SettingsT = TypeVar("SettingsT", bound=Settings)

SET = click.Option(
    ["--set"], multiple=True, metavar="KEY=VALUE", help="change a setting, as in pairs.draws=4; repeatable"
)
LOG_JSON = click.Option(["--log-json"], is_flag=True, help="print JSON lines, for collectors of logs")
RECIPE_OPTIONS: tuple[click.Parameter, ...] = (
    click.Option(["--recipe"], default="mini", help=f"one of {', '.join(RECIPES)}"),
    click.Option(
        ["--config"], metavar="FILE", help="a YAML file of settings with the keys of --set, which comes after"
    ),
    SET,
    click.Option(["--out"], default="runs/demo", help="folder or URL of the run"),
    click.Option(["--verbose"], is_flag=True, help="print all settings, not only the changed ones"),
    LOG_JSON,
)
DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="print what would be done, and do nothing")


@dataclass(frozen=True)
class Verb:
    """A command by its name, which runs as `snapfusion NAME` and as `python -m jobs.NAME`.

    Attributes:
        name: with underscores.
        command: its options and help.
        work: the body, called with the parsed options.
    """

    name: str
    command: click.Command
    work: Callable[[Options], None]

    def __call__(self, argv: Sequence[str] | None = None, *, program: str = "") -> int:
        """Parse the arguments (None takes the process's own), do the work, and return the exit code."""
        return run_guarded(self.name, lambda: self._run(argv, program or f"python -m jobs.{self.name}"))

    def exit(self) -> NoReturn:
        """Run with the process's arguments, and end the process."""
        exit_process(self())

    def _run(self, argv: Sequence[str] | None, program: str) -> None:
        options = parse(self.command, sys.argv[1:] if argv is None else argv, program=program)
        if options is not None:
            self.work(options)


def parse(command: click.Command, argv: Sequence[str], *, program: str) -> Options | None:
    """Parse a command line; None if it asks for help, which is printed.

    Raises:
        SettingsError: if an argument is not accepted, or holds a secret.
    """
    refuse_secrets_in_options(argv)
    try:
        # click itself never wraps below 50 columns.
        width = min(shutil.get_terminal_size().columns, 100)
        with command.make_context(program, list(argv), terminal_width=width) as context:
            return Options(**context.params)
    except click.exceptions.Exit:
        return None
    except click.UsageError as error:
        raise SettingsError(" ".join(error.format_message().split())) from None


def recipe_verb(
    name: str,
    body: Body,
    *,
    preview: Preview,
    about: str | None,
    target: str | None = None,
    writes: bool = True,
    options: Sequence[click.Parameter] = (),
    unread: Callable[[Recipe], Sequence[str]] = lambda _: (),
) -> Verb:
    """A verb that carries out a recipe's settings, or with --dry-run prints what it would do.

    Args:
        name: of the verb.
        body: the work.
        preview: lines that describe it.
        about: the module's docstring, whose first paragraph is the help text.
        target: name of a positional argument, required unless the job `writes`; None for none.
        writes: whether the job writes into the run, so that its settings are saved there.
        options: of the job's own, which `Job.options` then has.
        unread: keys of settings that the job does not read, and does not print unless they are assigned.
    """
    argument = click.Argument(["target"], metavar=target, required=not writes, default="" if writes else None)
    parameters = [*RECIPE_OPTIONS, DRY_RUN, *options, *([argument] if target else [])]

    def work(given: Options) -> None:
        """Preview the job, or save its settings and carry it out."""
        job = open_job(name, given)
        prepare_stores(job)
        if given.dry_run:
            heading = f"{name}: recipe {job.recipe.name}, settings {job.recipe.digest()[:16]}, dry run"
            lines = settings_lines(job, all_of_them=given.verbose, unread=unread(job.recipe))
            click.echo("\n".join([heading, *lines, *preview(job), *planned_lines(job)]))
            return
        if writes:
            save_settings(job, verbose=given.verbose, unread=unread(job.recipe))
        with progress_display(name):
            body(job)
        if following := FOLLOWING.get(name):
            logger.info(f"next: snapfusion {following} --recipe {job.recipe.name} --out {job.out}")

    return Verb(name, _command(name, about, parameters), work)


def settings_verb(
    name: str,
    settings: SettingsT,
    body: Callable[[SettingsT, Options], None],
    *,
    about: str | None,
    options: Sequence[click.Parameter],
) -> Verb:
    """A verb with settings of its own instead of a recipe, which are printed before the work.

    Args:
        name: of the verb.
        settings: that --set changes.
        body: the work, from the changed settings and the options.
        about: the module's docstring, whose first paragraph is the help text.
        options: beside --set.
    """

    def work(given: Options) -> None:
        changed = settings.with_values(given.set)
        click.echo(changed.to_json())
        with progress_display(name):
            body(changed, given)

    return Verb(name, _command(name, about, [SET, *options]), work)


def plain_verb(
    name: str, work: Callable[[Options], None], *, about: str | None, options: Sequence[click.Parameter]
) -> Verb:
    """A verb without settings; the arguments are as in `settings_verb`."""
    return Verb(name, _command(name, about, options), work)


def open_job(verb: str, options: Options, *, prefix: str = "") -> Job:
    """The job of a command line with `RECIPE_OPTIONS`.

    Args:
        verb: its name.
        options: as parsed.
        prefix: of assignments that are none of the recipe's; "" if all are.

    Raises:
        SettingsError: for an unknown recipe or setting, a value that is not accepted, or an empty --out.
    """
    log_as_json(options.log_json)
    if not options.out.rstrip("/"):
        raise SettingsError(f"--out {options.out!r}: a folder or a URL is accepted")
    try:
        check_table_url(options.out)
    except StorageError as error:
        raise SettingsError(f"--out {error}") from None
    config, assignments = (
        [one for one in given if not prefix or not one.startswith(prefix)]
        for given in (read_config(options.config), options.set)
    )
    target = getattr(options, "target", None) or ""
    return Job(
        verb=verb,
        recipe=resolve_recipe(options.recipe, assignments, config=config),
        out=options.out.rstrip("/"),
        target=target.rstrip("/"),
        options=vars(options),
        assigned=frozenset(one.partition("=")[0] for one in (*config, *assignments)),
    )


def _command(name: str, about: str | None, parameters: Sequence[click.Parameter]) -> click.Command:
    text = (about or "").split("\n\n")[0]
    shown = {"show_default": True}
    return click.Command(name.replace("_", "-"), params=list(parameters), help=text, context_settings=shown)
