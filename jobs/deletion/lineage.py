"""What was made of a run's tables: trainings pinned to a version, models that learned from it, bundles."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import fsspec

from jobs.training.run_folder import METRICS
from pipelines.storage.objects import absolute_url, read_bytes
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.export.bundle import MANIFEST
from snapfusion.settings import digest

_BEGUN = ".training/begun.json"
_LOG = "/_delta_log/"
_SIBLINGS = (".rejects", ".units")


class RunFiles:
    """The files of a run by their places in it, as they were when it was listed.

    Args:
        url: of the run.
    """

    def __init__(self, url: str) -> None:
        self.url = absolute_url(url)
        filesystem, root = fsspec.core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        found = filesystem.find(root) if filesystem.exists(root) else []
        prefix = f"{root.rstrip('/')}/"
        self.places: list[str] = sorted(path.removeprefix(prefix) for path in found)

    @cached_property
    def tables(self) -> list[str]:
        """The places of tables; what lies beside a table is none of its own."""
        roots = {place.partition(_LOG)[0] for place in self.places if _LOG in place}
        return sorted(root for root in roots if not root.endswith(_SIBLINGS))

    def ending(self, *endings: str) -> list[str]:
        """The places whose names end so."""
        return [place for place in self.places if place.endswith(endings)]

    def read(self, place: str) -> Any:  # noqa: ANN401 - JSON values
        """A JSON file; None if it is none, or gone by now."""
        try:
            return json.loads(read_bytes(f"{self.url}/{place}"))
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class PinnedTraining:
    """A training that reads a version of a table which still has rows that the newest has not.

    Attributes:
        place: of its folder in the run.
        table: the place of the table.
        version: it is pinned to.
        finished: whether it is done, so that nobody reads the version for it any more.
    """

    place: str
    table: str
    version: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Places in the run, each a list that may be empty.

    Attributes:
        trainings: pinned to a version with rows that are gone.
        models: finished trainings among them, and models that began with one or were taught by one.
        bundles: for phones, made of those.
        drawn: tables of pictures drawn by those.
        pages: that may show captions or pictures; nobody knows whose.
    """

    trainings: list[PinnedTraining] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)


def lineage_of(files: RunFiles, tables: Mapping[str, Snapshot]) -> Lineage:
    """What was made of older versions of tables whose rows were taken out.

    Args:
        files: of the run.
        tables: all tables of the run at their newest versions, by place.
    """
    results = [
        _Result(place=place.removesuffix(f"/{METRICS}"), told=told, finished=True)
        for place in files.ending(f"/{METRICS}")
        if isinstance(told := files.read(place), dict) and "identity" in told
    ]
    finished = {result.place for result in results}
    results += [
        _Result(place=place.removesuffix(_BEGUN), told=told, finished=False)
        for place in files.ending(_BEGUN)
        if place.removesuffix(_BEGUN) not in finished and isinstance(told := files.read(place), dict)
    ]
    pinned = [pin for result in results for pin in _pins(result, tables)]
    models = _models(results, {pin.place for pin in pinned if pin.finished})
    weights = {value for result in models for value in result.weights}
    return Lineage(
        trainings=sorted(pinned, key=lambda pin: (pin.place, pin.table)),
        models=sorted(result.place for result in models),
        bundles=_bundles(files, {result.told.get("settings_hash") for result in models}),
        drawn=sorted(
            place
            for place, table in tables.items()
            if table.identity["kind"] == "samples" and _unet(table.identity["model"]) in weights
        ),
        pages=files.ending(".html"),
    )


def pinned_versions(files: RunFiles, tables: Mapping[str, Snapshot]) -> dict[str, dict[int, str]]:
    """By the place of a table: the versions that trainings which have not ended are pinned to, and which."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    finished = {place.removesuffix(f"/{METRICS}") for place in files.ending(f"/{METRICS}")}
    for begun in files.ending(_BEGUN):
        training = begun.removesuffix(_BEGUN)
        if training in finished:
            continue
        for identity, version, url in _versions(files.read(begun)):
            same = {place: table for place, table in tables.items() if digest(table.identity) == identity}
            told = {place: table for place, table in same.items() if table.url == url}
            for place in told or same:
                found[place][version] = f"the training {training}, which has not ended"
    return found


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What a training's folder says of itself, at its end or when it was begun."""

    place: str
    told: dict[str, Any]
    finished: bool

    @property
    def weights(self) -> set[str]:
        """Hashes of the networks that came out of it."""
        told = self.told.get("weights")
        return set(told.values()) if isinstance(told, dict) else set()

    @property
    def parents(self) -> set[str]:
        """Hashes of the UNets that it was made from."""
        parents = self.told.get("parents") or {}
        return {_unet(parent) for parent in parents.values() if isinstance(parent, dict)} - {""}


def _unet(told: Mapping[str, Any]) -> str:
    weights = told.get("weights")
    return str(weights.get("unet", "")) if isinstance(weights, dict) else ""


def _pins(result: _Result, tables: Mapping[str, Snapshot]) -> Iterator[PinnedTraining]:
    """The versions that a training is pinned to, of tables that have lost rows since."""
    read: dict[tuple[str, int], set[str]] = defaultdict(set)
    for identity, version, url in _versions(result.told):
        read[identity, version].add(url)
    digests = {place: digest(table.identity) for place, table in tables.items()}
    for (identity, version), urls in read.items():
        same = [place for place in tables if digests[place] == identity]
        # Two tables may be made alike; where the training says which it read, that one is meant.
        told = [place for place in same if any(f"/{url}".endswith(f"/{place}") for url in urls)]
        for place in told or same:
            if _has_lost(tables[place], version):
                yield PinnedTraining(
                    place=result.place, table=place, version=version, finished=result.finished
                )


def _versions(told: object) -> Iterator[tuple[str, int, str]]:
    """Each mention of a table at a version: digest of its identity, version, and URL if it is told."""
    if isinstance(told, dict):
        identity, version = told.get("identity"), told.get("version")
        if isinstance(identity, str) and isinstance(version, int):
            yield identity, version, str(told.get("table", ""))
        for value in told.values():
            yield from _versions(value)


def _has_lost(table: Snapshot, version: int) -> bool:
    """Whether a version reads a file in whose place the newest reads another."""
    live = {file.path for file in table.units}
    try:
        return any(file.path not in live for file in open_table(table.url, version=version).units)
    except TableError:
        return False


def _models(results: Sequence[_Result], first: set[str]) -> list[_Result]:
    """The results at these places, and all that were made from them."""
    found = [result for result in results if result.place in first]
    while True:
        weights = {value for result in found for value in result.weights}
        more = [
            result
            for result in results
            if result not in found and result.finished and weights & result.parents
        ]
        if not more:
            return found
        found += more


def _bundles(files: RunFiles, hashes: Iterable[str | None]) -> list[str]:
    wanted = {value for value in hashes if value}
    manifests = files.ending(f"/{MANIFEST}")
    return [
        place.removesuffix(f"/{MANIFEST}")
        for place in manifests
        if wanted & _parent_hashes(files.read(place))
    ]


def _parent_hashes(manifest: object) -> set[str]:
    """The settings' hashes of the trainings whose model and decoder are in a bundle."""
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    parents = identity.get("parents") if isinstance(identity, dict) else None
    told = parents.values() if isinstance(parents, dict) else ()
    return {str(parent.get("settings_hash")) for parent in told if isinstance(parent, dict)}
