"""States a run, its inputs and its code in one digest: a second run sees at once that all is done."""

import glob
import os

import fsspec

from jobs.cli.job import Job
from jobs.cli.step_times import DONE
from jobs.recipes.recipe import EXAMPLE_BUCKET, Recipe
from jobs.reports.input_states import files_state
from jobs.reports.part_cache import code_digest
from jobs.runtime.secrets import string_values
from jobs.runtime.settings import StorageSettings
from jobs.runtime.versions import versions
from jobs.training.sources import RUN_PREFIX
from pipelines.storage.objects import exists, read_bytes, replace_object
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.source import source_paths
from snapfusion.settings import digest

_NO_OUTPUTS = ("report", "settings", "steps")
"""Folders of a run that no step reads."""


def is_done(job: Job) -> bool:
    """Whether the run's steps were all carried out from what there is now."""
    inputs = input_state(job)
    if inputs is None or not exists(_url(job)):
        return False
    return read_bytes(_url(job)) == _mark(job, inputs)


def mark_done(job: Job, inputs: str | None) -> None:
    """Record that the run's steps are all carried out, if their inputs could be listed.

    Args:
        job: the run.
        inputs: `input_state` before the first step: what has been added since is left to the next run.
    """
    if inputs is not None:
        replace_object(_url(job), _mark(job, inputs))


def input_state(job: Job) -> str | None:
    """Digest of each file that the recipe names, by size, time and checksum, as its store lists them.

    None if the recipe names what cannot be listed: a model of the hub, or a web address.
    """
    named = _files_named(job.recipe)
    if not _is_file(source_paths(job.recipe.model)[0]) or any(
        text.startswith(("http://", "https://")) for text in named
    ):
        return None
    return digest({text: _listing(str(BUNDLED.get(text, text))) for text in named})


def _mark(job: Job, inputs: str) -> bytes:
    """Content of the file of a finished run: its state, as JSON."""
    return f'"{_run_state(job, inputs)}"'.encode()


def _run_state(job: Job, inputs: str) -> str:
    """Digest of settings, code, inputs and outputs; a table stands by its log alone."""
    outputs = {name: _output_state(job.url(name)) for name in _folders(job.out) if name not in _NO_OUTPUTS}
    code = code_digest("jobs", "pipelines", "snapfusion")
    return digest([job.recipe.digest(), outputs, inputs, code, versions()])


def _url(job: Job) -> str:
    return job.url(f"steps/{job.recipe.digest()[:16]}{DONE}")


def _folders(url: str) -> list[str]:
    """Names of the folders in a folder; none if it does not exist."""
    filesystem, root = fsspec.core.url_to_fs(url)
    if not filesystem.isdir(root):
        return []
    found = filesystem.ls(root, detail=True)
    return sorted(
        info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory"
    )


def _output_state(url: str) -> list[list[str]]:
    log = f"{url}/_delta_log"
    return files_state(log if exists(log) else url)


def _files_named(recipe: Recipe) -> list[str]:
    """Values of settings that are files: bundled models, URLs and paths; no examples, which nothing reads."""
    values = string_values(recipe.model_copy(update={"storage": StorageSettings()}).to_values())
    texts = [text for _, text in values if not text.startswith((RUN_PREFIX, EXAMPLE_BUCKET))]
    named = {path for text in texts for path in source_paths(text)}
    return sorted(path for path in named if _is_file(path))


def _is_file(text: str) -> bool:
    return text in BUNDLED or "://" in text or (os.sep in text and bool(fsspec.filesystem("file").glob(text)))


def _listing(url: str) -> list[list[str]]:
    """The states of the files at or below a URL, which may be a glob."""
    filesystem, pattern = fsspec.core.url_to_fs(url)
    if not glob.has_magic(pattern):
        return files_state(url)
    return [
        state for path in filesystem.glob(pattern) for state in files_state(filesystem.unstrip_protocol(path))
    ]
