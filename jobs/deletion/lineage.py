"""Finds what was made of a run's tables: trainings pinned to a version, their models, samples and bundles."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import fsspec

from jobs.training.metrics import METRICS
from pipelines.exports.settings import EXPORT_RECORD
from pipelines.storage.objects import absolute_url, read_bytes
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.export.layout import MANIFEST
from snapfusion.records import RecordError
from snapfusion.settings import digest

_STARTED = ".training/begun.json"
_FOLLOWED = ".training/followed/"
_LOG = "/_delta_log/"
_KEPT_PARTS = "report/cache/"
"""Where `jobs.report` keeps its images; a folder of a run may hold a run itself."""
_SIBLINGS = (".rejects", ".units")


class RunFiles:
    """The files of a run, by path relative to it, as of the time of listing.

    Args:
        url: of the run.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute_url(url)
        filesystem, root = fsspec.core.url_to_fs(self.url)
        # fsspec keeps listings, which would hide what other processes have written since.
        filesystem.invalidate_cache()
        files = filesystem.find(root) if filesystem.exists(root) else []
        self.paths: list[str] = sorted(path.removeprefix(f"{root.rstrip('/')}/") for path in files)

    @cached_property
    def tables(self) -> list[str]:
        """Paths of the tables, without their sibling tables of rejects and units."""
        roots = {path.partition(_LOG)[0] for path in self.paths if _LOG in path}
        return sorted(root for root in roots if not root.endswith(_SIBLINGS))

    def folders_with(self, suffix: str) -> list[str]:
        """The paths with this suffix, without it."""
        return [path.removesuffix(suffix) for path in self.paths if path.endswith(suffix)]

    def read(self, path: str) -> Any:  # noqa: ANN401 - JSON values
        """A JSON file; None if it is not JSON, or was deleted since."""
        try:
            return json.loads(read_bytes(f"{self.url}/{path}"))
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True, kw_only=True)
class PinnedTraining:
    """A training that reads a table version with rows that the newest version no longer has.

    Attributes:
        path: of its folder in the run.
        table: path of the table.
        version: the pinned one.
        finished: whether it is done, so that it no longer reads the version.
    """

    path: str
    table: str
    version: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Results made from older versions of tables, as paths in the run.

    Attributes:
        trainings: pinned to a version with deleted rows.
        models: those of these trainings that are finished, and models initialised from or taught by one.
        bundles: for phones, made of these models.
        samples: tables of images that these models generated.
        exports: folders of rows for other training programs, made from such a version.
        pages: HTML files and kept parts of a report, which may show captions or images of any row.
    """

    trainings: list[PinnedTraining] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> list[PinnedTraining]:
        """The trainings that still read old files."""
        return [training for training in self.trainings if not training.finished]


def lineage_of(files: RunFiles, tables: Mapping[str, Snapshot]) -> Lineage:
    """Find results made from older versions of tables that rows were deleted from.

    Args:
        files: of the run.
        tables: all tables of the run at their newest versions, by path.
    """
    # Of a training with both records that of its end counts.
    trainings = list((_training_records(files, _STARTED) | _training_records(files, f"/{METRICS}")).values())
    pinned = [pin for training in trainings for pin in _pins(training, tables)]
    models = _with_descendants(trainings, {pin.path for pin in pinned if pin.finished})
    weights = {value for model in models for value in model.weights}
    hashes = {str(model.record["settings_hash"]) for model in models if model.record.get("settings_hash")}
    return Lineage(
        trainings=sorted(pinned, key=lambda pin: (pin.path, pin.table)),
        models=sorted(model.path for model in models),
        bundles=[
            path
            for path in files.folders_with(f"/{MANIFEST}")
            if hashes & _parent_hashes(files.read(f"{path}/{MANIFEST}"))
        ],
        samples=sorted(
            path
            for path, table in tables.items()
            if table.identity["kind"] == "samples" and _unet_hash(table.identity["model"]) in weights
        ),
        exports=[
            path for path in files.folders_with(f"/{EXPORT_RECORD}") if _is_outdated(files, path, tables)
        ],
        pages=[path for path in files.paths if path.endswith(".html") or _KEPT_PARTS in path],
    )


def _is_outdated(files: RunFiles, export: str, tables: Mapping[str, Snapshot]) -> bool:
    """Whether an export was made from a version of a table that has lost rows since."""
    made_of = _object(files.read(f"{export}/{EXPORT_RECORD}")).get("table")
    return any(
        _has_lost_rows(tables[path], version)
        for identity, version, url in _versions(made_of)
        for path in _tables_read(tables, identity, {url})
    )


def pinned_versions(files: RunFiles, tables: Mapping[str, Snapshot]) -> dict[str, dict[int, str]]:
    """Versions that unfinished trainings read, by table path, each with a description of its reader.

    Raises:
        RecordError: if the record of such a training is damaged, so that it is unknown what it reads.
    """
    pinned: dict[str, dict[int, str]] = defaultdict(dict)
    finished = set(files.folders_with(f"/{METRICS}"))
    for training in (path for path in files.folders_with(_STARTED) if path not in finished):
        for identity, version, url in [
            *_versions(_begun(files, training)),
            *_versions(_followed(files, training)),
        ]:
            same = [path for path, table in tables.items() if digest(table.identity) == identity]
            # Files are deleted by this: only an exact URL narrows it; a doubtful version stays pinned.
            for path in [path for path in same if tables[path].url == url] or same:
                pinned[path][version] = f"the training {training}, which has not finished"
    return pinned


def _begun(files: RunFiles, training: str) -> Any:  # noqa: ANN401 - JSON values
    record = files.read(f"{training}{_STARTED}")
    if "identity" not in _object(record):
        raise RecordError(
            f"{files.url}/{training}{_STARTED} is damaged, so which files its training reads is unknown: "
            f"restore it, or remove {training}.training if the training is not to go on"
        )
    return record


def _followed(files: RunFiles, training: str) -> Any:  # noqa: ANN401 - JSON
    """The last record of the units of a table that an unfinished training follows."""
    folder = f"{training}{_FOLLOWED}"
    records = [path for path in files.paths if path.startswith(folder) and path[len(folder)].isdecimal()]
    return files.read(records[-1]) if records else None


@dataclass(frozen=True)
class _TrainingRecord:
    """Record in a training's folder of its start or its end."""

    path: str
    record: dict[str, Any]
    finished: bool

    @property
    def weights(self) -> set[str]:
        """Hashes of the networks that it made."""
        return set(_object(self.record.get("weights")).values())

    @property
    def parents(self) -> set[str]:
        """Hashes of the UNets that it was made from."""
        return {_unet_hash(parent) for parent in _object(self.record.get("parents")).values()} - {""}


def _training_records(files: RunFiles, suffix: str) -> dict[str, _TrainingRecord]:
    """By path, the trainings whose folder has a record of this name."""
    records = {path: files.read(f"{path}{suffix}") for path in files.folders_with(suffix)}
    if suffix == _STARTED:
        # Units that came after its begin are in a later version than the one it was begun with.
        for path, record in records.items():
            _object(record)["followed"] = _followed(files, path)
    return {
        path: _TrainingRecord(path, record, finished=suffix != _STARTED)
        for path, record in records.items()
        if "identity" in _object(record)
    }


def _object(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else: records may be of another program or release."""
    return value if isinstance(value, dict) else {}


def _unet_hash(model: object) -> str:
    return str(_object(_object(model).get("weights")).get("unet", ""))


def _pins(training: _TrainingRecord, tables: Mapping[str, Snapshot]) -> Iterator[PinnedTraining]:
    """The versions that a training is pinned to, of tables that have lost rows since."""
    urls: dict[tuple[str, int], set[str]] = defaultdict(set)
    for identity, version, url in _versions(training.record):
        urls[identity, version].add(url)
    for (identity, version), named in urls.items():
        for path in _tables_read(tables, identity, named):
            if _has_lost_rows(tables[path], version):
                yield PinnedTraining(
                    path=training.path, table=path, version=version, finished=training.finished
                )


def _tables_read(tables: Mapping[str, Snapshot], identity: str, urls: set[str]) -> list[str]:
    """Paths of the tables of an identity, which two tables may share: those at `urls` if any of them is."""
    same = [path for path, table in tables.items() if digest(table.identity) == identity]
    return [path for path in same if any(f"/{url}".endswith(f"/{path}") for url in urls)] or same


def _versions(record: object) -> Iterator[tuple[str, int, str]]:
    """Each mention of a table version in nested JSON: digest of the identity, version, and URL or ""."""
    values = _object(record)
    identity, version = values.get("identity"), values.get("version")
    if isinstance(identity, str) and isinstance(version, int):
        yield identity, version, str(values.get("table", ""))
    for value in values.values():
        yield from _versions(value)


def _has_lost_rows(table: Snapshot, version: int) -> bool:
    """Whether a version reads a file that the newest version has replaced."""
    current = {file.path for file in table.units}
    try:
        return any(file.path not in current for file in open_table(table.url, version=version).units)
    except TableError:
        return False  # nobody can read a version that cannot be opened


def _with_descendants(trainings: list[_TrainingRecord], paths: set[str]) -> list[_TrainingRecord]:
    """The trainings at these paths and all finished ones that were made from them, directly or not."""
    models = [training for training in trainings if training.path in paths]
    # Until nothing is added: a student may be the teacher or the initial weights of another.
    while True:
        weights = {value for model in models for value in model.weights}
        more = [one for one in trainings if one not in models and one.finished and weights & one.parents]
        if not more:
            return models
        models += more


def _parent_hashes(manifest: object) -> set[str]:
    """Settings hashes of the trainings whose model and decoder are in a bundle."""
    parents = _object(_object(_object(manifest).get("identity")).get("parents"))
    return {str(_object(parent).get("settings_hash")) for parent in parents.values()}
