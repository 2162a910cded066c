"""REFERENCES: the features of real pictures, which a Frechet distance is taken to. SnapFusion Sec. 5.

picture names ─ units ─ features ─ data file ─ commit
"""

from __future__ import annotations

import hashlib
import json
from functools import reduce
from typing import Any

import fsspec
import pyarrow as pa
import torch

from pipelines.datasets.settings import ReferencesSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.sources import SourceError
from pipelines.stages.image import FORMATS
from pipelines.stages.reference import SCENE_PREFIX, ExtractFeatures
from pipelines.stages.settings import Device, MetricSettings
from pipelines.stages.write import WriteUnit, pack
from pipelines.storage.objects import absolute_url
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import array_type, references_schema
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import ImageNameRows, Unit, committed_ranges, uncovered_ranges
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.metrics.moments import Moments
from snapfusion.settings import differences, digest

_SUFFIXES = (".jpg", ".jpeg", *(f".{name.lower()}" for name in FORMATS))


_UNIT_FIELDS = ("source", "start", "stop", "final", "source_digest")


def identity_of(settings: ReferencesSettings, *, judging: MetricSettings) -> dict[str, Any]:
    """Everything that determines the rows of REFERENCES, the pictures apart (each unit states its own)."""
    scenes = settings.url is None
    return {
        "kind": "references",
        "pictures": settings.name,
        "features": judging.describe_features(),
        "prepared": "as drawn"
        if scenes
        else {"crop": "middle square", "size": settings.size, "kernel": "lanczos"},
        "images": settings.images.to_values(),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": "float32",
    }


def image_names(settings: ReferencesSettings) -> list[str]:
    """The first `count` pictures by name.

    Raises:
        SourceError: if the folder holds fewer.
    """
    if settings.url is None:
        return [f"{SCENE_PREFIX}{number}" for number in range(settings.count)]
    place = absolute_url(settings.url)
    filesystem, path = fsspec.core.url_to_fs(place)
    names = sorted(entry for entry in filesystem.find(path) if entry.lower().endswith(_SUFFIXES))
    if len(names) < settings.count:
        raise SourceError(f"{settings.url} holds {len(names)} pictures, {settings.count} are asked for")
    return [filesystem.unstrip_protocol(name) for name in names[: settings.count]]


def compute_references(
    settings: ReferencesSettings,
    *,
    judging: MetricSettings,
    url: str,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to all pictures; returns its newest version. It is described once and kept.

    Raises:
        SourceError: if there are not as many pictures.
        TableError: if the table was made with other settings, another network or other pictures.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    names = image_names(settings)
    schema = references_schema(features=judging.feature_count)
    table = create_table(url, schema=schema, identity=identity_of(settings, judging=judging))
    table = recover(table, origin=origin)
    items = pending_units(settings, names=names, accounts=list(table.manifests().values()))
    arguments = {
        "features": judging.features,
        "images": settings.images,
        "size": settings.size,
        "device": settings.device,
    }
    written = {"url": table.url, "schema": schema, "settings": digest(table.identity)}
    stages = [
        PipelineStage(build=ExtractFeatures, arguments=arguments, pool=settings.describers),
        PipelineStage(build=WriteUnit, arguments=written, pool=settings.writers),
    ]
    total = sum(item.unit.rows_read for item in items)
    finished = run(items, stages)
    return commit_stream(
        table, finished, bounds=settings.bounds, total=total, origin=origin, on_progress=on_progress
    )


def pending_units(
    settings: ReferencesSettings, *, names: list[str], accounts: list[UnitManifest]
) -> list[ImageNameRows]:
    """The units that no committed one covers.

    Raises:
        TableError: if a committed unit was made of other pictures than those given.
    """
    for account in accounts:
        if _names_digest(names[account.start : account.stop]) != account.source_digest:
            raise TableError(
                f"unit {account.unit} was made of other pictures than {account.start} .. {account.stop} of "
                "those given; give the same folder (it may grow at its end), or a new table"
            )
    committed = committed_ranges(accounts, settings.name)
    return [
        ImageNameRows(
            unit=Unit(
                name=f"{settings.name}-{gap.start:09d}-{gap.stop:09d}",
                source=settings.name,
                start=gap.start,
                stop=gap.stop,
                final=gap.final,
                source_digest=_names_digest(names[gap.start : gap.stop]),
            ),
            names=names[gap.start : gap.stop],
        )
        for gap in uncovered_ranges(len(names), committed=committed, rows_per_unit=settings.rows_per_unit)
    ]


def recomputer(table: Snapshot, *, settings: ReferencesSettings, judging: MetricSettings) -> Recompute:
    """What `verify_table` needs to make units of REFERENCES again, from the pictures that their rows name.

    Raises:
        TableError: if the table was made by another network or with other settings.
    """
    wanted = identity_of(settings, judging=judging)
    told = {name: table.identity[name] for name in wanted}
    if differing := list(differences(told, wanted)):
        raise TableError(f"{table.url} was made otherwise: {'; '.join(differing[:3])}")
    schema = references_schema(features=judging.feature_count)

    def make(account: UnitManifest, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if account.rejected():
            raise CannotRecompute("pictures that could not be read are not in it, and batches depend on them")
        unit = Unit(**{name: getattr(account, name) for name in _UNIT_FIELDS}, name=account.unit)
        device = Device(threads=account.environment["threads"])
        stage = ExtractFeatures(
            features=judging.features, images=settings.images, size=settings.size, device=device
        )
        finished = stage(ImageNameRows(unit=unit, names=rows.column("id").to_pylist()))
        return pack(finished, schema), finished.environment

    return make


def moments_of(table: Snapshot) -> Moments:
    """The moments of all rows, merged in float64 in order of the units.

    Raises:
        TableError: if there are no rows.
    """
    parts = [_moments(table.read_unit(unit, ["features"])) for unit in table.units]
    if not parts:
        raise TableError(f"{table.url} has no committed rows at version {table.version}")
    return reduce(Moments.merge, parts)


def _moments(rows: pa.Table) -> Moments:
    features = array_type(rows.schema.field("features")).unpack(rows.column("features").to_pylist())
    return Moments.of(torch.from_numpy(features.copy()))


def _names_digest(names: list[str]) -> str:
    # A folder may be moved: what a picture is called in it says which one it is.
    return hashlib.sha256(json.dumps([name.rpartition("/")[2] for name in names]).encode()).hexdigest()
