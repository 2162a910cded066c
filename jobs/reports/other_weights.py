"""Finds published weights that are not those that a training's metrics.json names."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial

from pydantic import TypeAdapter

from jobs.reports.input_states import files_state
from jobs.reports.run_records import CommittedRun
from pipelines.storage.objects import exists, open_object

_FORM = TypeAdapter(tuple[str, ...])
_CHUNK_BYTES = 1 << 20


def other_weights(run: CommittedRun) -> tuple[str, ...]:
    """A sentence for each file of the student's or the decoder's weights that was replaced or is missing."""
    job = run.job
    recorded = {
        folder: record.get("weight_files", {})
        for folder, record in ((job.recipe.distill.name, run.student), ("decoder", run.decoder))
        if record
    }
    return run.cache.part(
        "weights",
        _FORM,
        follows_from=[recorded, {folder: files_state(job.url(folder)) for folder in recorded}],
        compute=lambda: tuple(
            f"{folder}/{name} has other weights than those that the numbers of {folder} were measured on"
            for folder, files in recorded.items()
            for name in _replaced(job.url(folder), files)
        ),
    )


def _replaced(url: str, recorded: Mapping[str, str]) -> Iterator[str]:
    for name, sha256 in recorded.items():
        path = f"{url}/{name}"
        if not exists(path) or _sha256(path) != sha256:
            yield name


def _sha256(url: str) -> str:
    total = hashlib.sha256()
    with open_object(url) as file:
        for chunk in iter(partial(file.read, _CHUNK_BYTES), b""):
            total.update(chunk)
    return total.hexdigest()
