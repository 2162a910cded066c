"""Compacts a table: the same rows, ids and order in a new table of fewer, larger files.

 units of the parent, in order ─ groups of at most `file_mib` ─ data file ─ commit

The parent stays as it is, for trainings that are pinned to it. The version that was compacted is part of the
new table's identity, so a killed compaction goes on with it, whatever the parent has got since; of its units
the present files are read, which lack rows that were deleted on request.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from pipelines.datasets.build import Identity
from pipelines.datasets.settings import CompactionSettings
from pipelines.loading.branches import branch_and_draw, unit_name
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.stages.compact import CompactedUnit, CompactUnits, concatenated
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover
from pipelines.tables.compacted import COMPACTED, compaction_of
from pipelines.tables.leases import read_lease, write_lease
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import Snapshot, TableError, create_table, is_table, open_table
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.units import Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.settings import digest

KINDS: Final = ("latents", "pairs", "targets")
"""Kinds of tables that can be compacted."""


def compact_table(
    parent: Snapshot,
    settings: CompactionSettings,
    *,
    url: str,
    origin: Callable[[Snapshot], Origin] | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Create the compacted table at `url` or complete it; returns its newest version.

    Args:
        parent: the table to compact, at its newest version.
        settings: of the compaction.
        url: of the new table.
        origin: of its units, from the version of the parent that is compacted.
        run: sends units through workers.
        on_progress: called after each unit.

    Raises:
        TableError: if tables of this kind are not compacted, the parent has no rows, or there is a table of
            another identity at `url`.
    """
    if (kind := parent.identity["kind"]) not in KINDS:
        raise TableError(f"{parent.url} holds {kind}; {', '.join(KINDS)} can be compacted")
    planned = _planned_version(parent, url)
    first = next((file for file in parent.units if file.rows), None)
    if first is None:
        raise TableError(f"{parent.url} has no committed rows at version {parent.version}")
    identity = _identity_of(planned, settings)
    schema = parent.read_unit(first).schema.remove_metadata()
    made_by = origin(planned) if origin else None
    table = recover(create_table(url, schema=schema, identity=identity), origin=made_by)
    committed = {file.unit for file in table.units}
    plans = plan_units(planned, parent, file_mib=settings.file_mib)
    units = [each for each in plans if each.unit.name not in committed]
    stage = PipelineStage(
        build=CompactUnits,
        arguments={
            "parent": parent.url,
            "version": parent.version,
            "url": table.url,
            "settings": digest(table.identity),
        },
        pool=settings.compactors,
    )
    reading = read_lease(parent.url, version=parent.version, purpose="a compaction")
    with reading, write_lease(table.url, purpose="a compaction"):
        return commit_stream(
            table,
            run(units, [stage]),
            bounds=settings.bounds,
            total=sum(file.rows for each in units for file in each.files),
            origin=made_by,
            on_progress=on_progress,
        )


def plan_units(planned: Snapshot, parent: Snapshot, *, file_mib: float) -> list[CompactedUnit]:
    """The units of the compacted table, each with the present files of the parent's units in it.

    Args:
        planned: the version of the parent that is compacted; its log alone is read.
        parent: at its newest version.
        file_mib: see `CompactionSettings`.

    Raises:
        TableError: if a unit of that version is missing in the newest.
    """
    present = {file.unit: file for file in parent.units}
    files = [file for file in planned.units if file.rows]
    if lost := [file.unit for file in files if file.unit not in present]:
        raise TableError(f"{parent.url} no longer has unit {lost[0]}, which version {planned.version} has")
    units, start = [], 0
    for group in _groups(files, limit=file_mib * 2**20, kind=planned.identity["kind"]):
        stop = start + sum(file.rows for file in group)
        # The files' hashes change when rows are deleted, and a killed compaction then goes on all the same.
        names = "\n".join(f"{file.unit} {file.rows}" for file in group)
        unit = Unit(
            name=f"{_prefix(planned.identity['kind'], group[0].unit)}rows-{start:012d}-{stop:012d}",
            source=_name_of(planned.url),
            start=start,
            stop=stop,
            final=stop == planned.num_rows,
            source_digest=hashlib.sha256(names.encode()).hexdigest(),
        )
        units.append(CompactedUnit(unit=unit, files=tuple(present[file.unit] for file in group)))
        start = stop
    return units


def recomputer(table: Snapshot, *, parent: Snapshot) -> Recompute:
    """Recomputes units of a compacted table for `verify_table`: reads the rows of the parent.

    Raises:
        TableError: if `parent` is not the table that was compacted.
    """
    compaction = compaction_of(table.identity) or {}
    if digest(parent.identity) != compaction.get("identity"):
        raise TableError(f"{parent.url} is not the table that {table.url} was compacted from")
    planned = open_table(parent.url, version=compaction["version"])
    plans = {each.unit.name: each for each in plan_units(planned, parent, file_mib=compaction["file_mib"])}

    def recompute(manifest: UnitManifest, _rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """The rows of the parent that make up one unit; see `Recompute`."""
        if manifest.unit not in plans:
            raise CannotRecompute(f"version {planned.version} of {parent.url} has no such rows")
        return concatenated(parent, plans[manifest.unit].files), {}

    return recompute


def _planned_version(parent: Snapshot, url: str) -> Snapshot:
    """The version of the parent that the table at `url` is compacted from; its newest for a new table."""
    compaction = compaction_of(open_table(url).identity) if is_table(url) else None
    return open_table(parent.url, version=compaction["version"]) if compaction else parent


def _identity_of(planned: Snapshot, settings: CompactionSettings) -> Identity:
    compaction = {
        "table": _name_of(planned.url),
        "identity": digest(planned.identity),
        "version": planned.version,
        "file_mib": settings.file_mib,
    }
    return {**planned.identity, COMPACTED: compaction}


def _name_of(url: str) -> str:
    return url.rpartition("/")[2]


def _groups(files: Sequence[UnitFile], *, limit: float, kind: str) -> Iterator[list[UnitFile]]:
    """Neighbouring files with together at most `limit` bytes; of TARGETS, of one branch and draw."""
    group: list[UnitFile] = []
    for file in files:
        full = sum(each.size for each in group) + file.size > limit
        if group and (full or _prefix(kind, file.unit) != _prefix(kind, group[0].unit)):
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _prefix(kind: str, unit: str) -> str:
    """What begins a unit's name: in TARGETS branch and draw, by which a training finds its rows."""
    if kind != "targets":
        return ""
    guided, draw = branch_and_draw(unit)
    return unit_name("", draw=draw, guided=guided)
