"""The command line that jobs share: four options, settings printed and saved, errors in one line."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jobs.recipes.recipe import Recipe
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.renamed import refuse_renamed
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.credentials import apply_storage
from jobs.runtime.exit_codes import run_guarded
from jobs.runtime.secrets import refuse_secrets, string_values, without_secret
from jobs.training.sources import RECIPE_MODEL
from pipelines.storage.objects import StorageError, absolute_url, check_client, write_once
from snapfusion.settings import Settings, SettingsError, flatten

RUN_PREFIX = "run:"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job and its run.

    Attributes:
        verb: its name.
        recipe: the resolved settings.
        out: folder or URL of the run; every job reads its inputs there and writes one output beside them.
        target: the positional argument of a job that takes one; else empty.
        options: the parsed command line, with the job's own options.
    """

    verb: str
    recipe: Recipe
    out: str
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def origin(self, parents: Mapping[str, Any]) -> dict[str, Any]:
        """Origin that this job records with the units it commits."""
        return {"recipe": self.recipe.name, "settings": self.recipe.digest(), "parents": dict(parents)}

    def url(self, name: str) -> str:
        """URL of `name` in this run."""
        return f"{self.out}/{name}"

    def resolve(self, source: str) -> str:
        """URL of a source: "run:student-8/raw" lies in this run, "recipe:model" is the recipe's model."""
        if source == RECIPE_MODEL:
            return self.recipe.model
        return self.url(source.removeprefix(RUN_PREFIX)) if source.startswith(RUN_PREFIX) else source

    def with_run_prefix(self, text: str) -> str:
        """JSON text with URLs in this run written as "run:...", to be read where the run is not."""
        return text.replace(f'"{absolute_url(self.out)}/', f'"{RUN_PREFIX}')


SettingsT = TypeVar("SettingsT", bound=Settings)
Body = Callable[[Job], None]
Preview = Callable[[Job], list[str]]


def run(
    verb: str,
    body: Body,
    argv: Sequence[str] | None = None,
    *,
    preview: Preview,
    about: str | None,
    target: str | None = None,
    writes: bool = True,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse the command line, run `body` (or with --dry-run print `preview`) and return the exit code.

    Args:
        verb: name of the job.
        body: the work.
        argv: arguments; None takes the process's own.
        preview: lines that describe it.
        about: the module's docstring, whose first paragraph is the help text.
        target: name of a positional argument, required unless the job `writes`; None for none.
        writes: whether the job writes into the run, so that its settings are saved there.
        options: adds options of the job's own, which `Job.options` then has.
    """
    parser = recipe_parser(verb, about=about, set_help="change a setting, as in pairs.draws=4")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    if target:
        parser.add_argument("target", metavar=target, nargs="?" if writes else None, default="")
    if options:
        options(parser)

    def work() -> None:
        """Parse the options, then preview the job or carry it out."""
        given = parser.options(argv)
        job = Job(
            verb=verb,
            recipe=resolve_recipe(given.recipe, given.set),
            out=given.out.rstrip("/"),
            target=given.target.rstrip("/") if target else "",
            options=vars(given),
        )
        prepare_stores(job)
        if given.dry_run:
            print("\n".join([job.recipe.to_json(), f"settings {job.recipe.digest()[:16]}", *preview(job)]))
            return
        if writes:
            _save_settings(job)
        body(job)

    return run_guarded(verb, work)


def run_with_settings(
    verb: str,
    settings: SettingsT,
    body: Callable[[SettingsT, argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    *,
    about: str | None,
    options: Callable[[argparse.ArgumentParser], None],
) -> int:
    """Run a job that has settings of its own instead of a recipe, print them, and return the exit code.

    Args:
        verb: name of the job.
        settings: that --set changes.
        body: the work, from the changed settings and the parsed command line.
        argv: arguments; None takes the process's own.
        about: the module's docstring, whose first paragraph is the help text.
        options: adds the options beside --set.
    """
    parser = _settings_parser(verb, about=about, set_help="change a setting")
    options(parser)

    def work() -> None:
        given = parser.options(argv)
        changed = settings.with_values(given.set)
        print(changed.to_json())
        body(changed, given)

    return run_guarded(verb, work)


def recipe_parser(verb: str, *, about: str | None, set_help: str) -> OneLineParser:
    """A parser with the options --recipe, --set and --out."""
    parser = _settings_parser(verb, about=about, set_help=set_help)
    parser.add_argument("--recipe", default="mini", help=f"one of {', '.join(RECIPES)} (default: mini)")
    parser.add_argument("--out", default="runs/demo", help="folder or URL of the run (default: runs/demo)")
    return parser


def _settings_parser(verb: str, *, about: str | None, set_help: str) -> OneLineParser:
    parser = OneLineParser(prog=f"python -m jobs.{verb}", description=(about or "").split("\n\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    return parser


def resolve_recipe(name: str, assignments: Sequence[str]) -> Recipe:
    """A recipe with the assignments of --set.

    Raises:
        SettingsError: if there is no such recipe or setting, or a value is not accepted.
    """
    recipe = recipe_named(name)
    try:
        refuse_renamed(assignments)
        return recipe.with_values(assignments)
    except SettingsError as error:
        raise SettingsError(f"--set {without_secret(error)}") from None


def prepare_stores(job: Job) -> None:
    """Refuse secrets in the recipe, apply its credentials, and check that all stores can be accessed.

    Raises:
        SettingsError: for a secret.
        CredentialsError: for credentials that cannot be used.
        StorageError: for a store whose package is not installed.
    """
    refuse_secrets(job.recipe)
    apply_storage(job.recipe.storage)
    for where, text in [("--out", job.out), ("", job.target), *string_values(job.recipe.to_values())]:
        if _URL.fullmatch(text):
            try:
                check_client(text)
            except StorageError as error:
                raise StorageError(f"{where} {error}".strip()) from None


def _save_settings(job: Job) -> None:
    """Print the resolved settings and save them under their hash, before anything else is written."""
    digest = job.recipe.digest()[:16]
    url = job.url(f"settings/{digest}.json")
    try:
        write_once(url, job.recipe.to_json().encode())
    except StorageError as error:
        raise StorageError(f"--out {error}") from None
    print(f"{job.verb}: recipe {job.recipe.name}, settings {digest}, saved as {url}")
    for key, value in flatten(job.recipe.to_values()):
        print(f"  {key} = {value}")
