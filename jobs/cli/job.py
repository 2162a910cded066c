"""The command line that jobs share: four options, settings printed and saved, errors in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.recipes.recipe import Recipe
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.credentials import apply_storage
from jobs.runtime.exit_codes import run_guarded
from jobs.runtime.secrets import refuse_secrets, string_values, without_secret
from jobs.training.sources import RECIPE_MODEL
from pipelines.storage.objects import StorageError, absolute_url, check_client, write_once
from snapfusion.settings import SettingsError

RUN_PREFIX = "run:"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job was asked to do.

    Attributes:
        verb: its name.
        recipe: the resolved settings.
        out: folder or URL of the run; every job reads its parents there and writes one thing beside them.
        target: what a job that takes an argument was pointed at; else empty.
        asked: what its own options say, where it has some.
    """

    verb: str
    recipe: Recipe
    out: str
    target: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)

    def origin(self, parents: Mapping[str, Any]) -> dict[str, Any]:
        """What this job writes beside the units it commits."""
        return {"recipe": self.recipe.name, "settings": self.recipe.digest(), "parents": dict(parents)}

    def place(self, name: str) -> str:
        """Where `name` lies in this run."""
        return f"{self.out}/{name}"

    def source(self, name: str) -> str:
        """A model's or table's source; after "run:" it is a place in this run, as in run:student-8/raw.

        "recipe:model" is the recipe's own model.
        """
        if name == RECIPE_MODEL:
            return self.recipe.model
        return self.place(name.removeprefix(RUN_PREFIX)) if name.startswith(RUN_PREFIX) else name

    def quotable(self, text: str) -> str:
        """JSON text with places in this run told as such ("run:..."): it is read where the run is not."""
        return text.replace(f'"{absolute_url(self.out)}/', f'"{RUN_PREFIX}')


Body = Callable[[Job], None]
Preview = Callable[[Job], list[str]]


def run(
    verb: str,
    body: Body,
    *,
    preview: Preview,
    about: str | None,
    argv: Sequence[str] | None,
    target: str | None = None,
    writes: bool = True,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse the options, carry out `body` (or, with --dry-run, print `preview`) and return the exit code.

    `target` is the name of a positional argument. A job that looks at one thing and `writes` none needs it;
    for another the recipe says what is taken if it is left out. `options` adds options of its own, which
    `Job.asked` then has.
    """
    parser = OneLineParser(prog=f"python -m jobs.{verb}", description=(about or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="mini", help=f"one of {', '.join(RECIPES)} (default: mini)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, as in pairs.draws=4",
    )
    parser.add_argument("--out", default="runs/demo", help="folder or URL of the run (default: runs/demo)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    if target:
        parser.add_argument("target", metavar=target, nargs="?" if writes else None, default="")
    if options:
        options(parser)

    def work() -> None:
        given = parser.options(argv)
        job = Job(
            verb=verb,
            recipe=_resolve_recipe(given.recipe, given.set),
            out=given.out.rstrip("/"),
            target=given.target.rstrip("/") if target else "",
            asked=vars(given),
        )
        prepare_stores(job)
        if given.dry_run:
            print(job.recipe.to_json())
            print("\n".join([f"settings {job.recipe.digest()[:16]}", *preview(job)]))
            return
        if writes:
            _save_settings(job)
        body(job)

    return run_guarded(verb, work)


def _resolve_recipe(name: str, assignments: Sequence[str]) -> Recipe:
    recipe = recipe_named(name)
    try:
        return recipe.with_values(assignments)
    except SettingsError as error:
        raise SettingsError(f"--set {without_secret(error)}") from None


def prepare_stores(job: Job) -> None:
    """Refuse secrets in the recipe, take up its credentials, and refuse stores that cannot be reached.

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
    text = job.recipe.to_json()
    digest = job.recipe.digest()[:16]
    place = job.place(f"settings/{digest}.json")
    try:
        write_once(place, text.encode())
    except StorageError as error:
        raise StorageError(f"--out {error}") from None
    print(f"{job.verb}: recipe {job.recipe.name}, settings {digest}, saved as {place}")
    for line in _flatten(job.recipe.to_values()):
        print(f"  {line}")


def _flatten(values: dict[str, object], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {value}")
    return lines
