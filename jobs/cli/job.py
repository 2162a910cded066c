"""A job: the recipe and the run it works on, its settings saved before anything else is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.recipes.recipe import Recipe
from jobs.recipes.registry import recipe_named
from jobs.recipes.renamed import refuse_renamed
from jobs.runtime.credentials import apply_storage
from jobs.runtime.logs import logger
from jobs.runtime.secrets import refuse_secrets, string_values, without_secret
from jobs.training.sources import RECIPE_MODEL, RUN_PREFIX
from pipelines.storage.objects import StorageError, absolute_url, check_client, write_once
from snapfusion.settings import SettingsError, flatten

_LIST_CHARS = 80
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
        assigned: keys of the settings that --config and --set assign.
    """

    verb: str
    recipe: Recipe
    out: str
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    assigned: frozenset[str] = frozenset()

    def origin(self, parents: Mapping[str, Any]) -> dict[str, Any]:
        """Origin that this job records with the units it commits."""
        return {"recipe": self.recipe.name, "settings": self.recipe.digest(), "parents": dict(parents)}

    def assigns(self, key: str) -> bool:
        """Whether --config or --set assigns a setting, or a mapping that holds it."""
        parts = key.split(".")
        return any(".".join(parts[:count]) in self.assigned for count in range(1, len(parts) + 1))

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


def resolve_recipe(name: str, assignments: Sequence[str], *, config: Sequence[str] = ()) -> Recipe:
    """A recipe with the assignments of --config and then those of --set.

    Another model than the recipe's own changes what follows from the model, unless that is assigned, too.

    Raises:
        SettingsError: if there is no such recipe or setting, or a value is not accepted.
        ModelError: if there is no such model.
        CredentialsError: for credentials of its store that cannot be used.
    """
    usual = recipe_named(name)
    recipe = _assigned(usual, assignments, config=config)
    if recipe.model == usual.model:
        return recipe
    refuse_secrets(recipe)
    apply_storage(recipe.storage)
    return _assigned(recipe_named(name, model=recipe.model), assignments, config=config)


def _assigned(recipe: Recipe, assignments: Sequence[str], *, config: Sequence[str]) -> Recipe:
    for option, values in (("--config", config), ("--set", assignments)):
        try:
            refuse_renamed(values)
            recipe = recipe.with_values(values)
        except SettingsError as error:
            raise SettingsError(f"{option} {without_secret(error)}") from None
    return recipe


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


def save_settings(job: Job, *, verbose: bool, unread: Sequence[str] = ()) -> None:
    """Save the resolved settings under their hash, and print those of `settings_lines`."""
    digest = job.recipe.digest()[:16]
    url = job.url(f"settings/{digest}.json")
    try:
        write_once(url, job.recipe.to_json().encode())
    except StorageError as error:
        raise StorageError(f"--out {error}") from error
    logger.info(f"{job.verb}: recipe {job.recipe.name}, settings {digest}, saved as {url}")
    for line in settings_lines(job, all_of_them=verbose, unread=unread):
        logger.info(line)


def settings_lines(job: Job, *, all_of_them: bool, unread: Sequence[str] = ()) -> list[str]:
    """The settings that differ from those of the recipe of this name, or all settings.

    Args:
        job: whose settings they are.
        all_of_them: whether to list all, and long lists in full.
        unread: keys of settings, or of mappings of them, that the job does not read. Those that were not
            assigned are only counted.
    """
    values = list(flatten(job.recipe.to_values()))
    if all_of_them:
        return [f"  {key} = {value}" for key, value in values]
    usual = dict(flatten(recipe_named(job.recipe.name).to_values()))
    changed = [(key, value) for key, value in values if key not in usual or usual[key] != value]
    ignored = tuple(f"{key}." for key in unread)
    shown = [(key, value) for key, value in changed if job.assigns(key) or not f"{key}.".startswith(ignored)]
    lines = [f"  {key} = {_shortened(value)}" for key, value in shown]
    if count := len(changed) - len(shown):
        lines.append(f"  and {count} that no step of this run reads (--verbose lists all settings)")
    return lines


def _shortened(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = str(value)
    return f"{text[:_LIST_CHARS]}..." if isinstance(value, list) and len(text) > _LIST_CHARS else text
