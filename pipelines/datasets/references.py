"""REFERENCES: features of real images, the other side of the Frechet distance. SnapFusion Sec. 5.

image names ─ units ─ features ─ data file ─ commit
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Unpack

import numpy as np
import pyarrow as pa
import torch

from pipelines.datasets.build import BuildOptions, Identity, build_table, check_list, list_units
from pipelines.datasets.recompute import check_same, device_of, packed
from pipelines.datasets.settings import ReferencesSettings
from pipelines.ray_data.execution import PipelineStage
from pipelines.sources import SourceError
from pipelines.sources.real_images import list_real_images
from pipelines.stages.metric_networks import describe_features
from pipelines.stages.reference import SCENE_PREFIX, ExtractFeatures
from pipelines.stages.settings import Device, MetricSettings
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import read_array, references_schema
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.units import FinishedRows, ImageNameRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.metrics.moments import Moments
from snapfusion.mini.scenes import held_out_index


def identity_of(settings: ReferencesSettings, *, metrics: MetricSettings) -> Identity:
    """Everything that determines the rows of REFERENCES but the images, which each unit records."""
    crop = {"crop": "middle square", "size": settings.size, "kernel": "lanczos"}
    return {
        "kind": "references",
        "pictures": settings.name,
        "features": describe_features(metrics.features),
        "prepared": "as drawn" if settings.url is None else crop,
        "images": settings.images.to_values(),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": "float32",
    }


def image_names(settings: ReferencesSettings) -> list[str]:
    """The first `count` images by name.

    Raises:
        SourceError: if the folder holds fewer.
    """
    if settings.url is None:
        positions = range(settings.first, settings.first + settings.count)
        return [f"{SCENE_PREFIX}{held_out_index(position, split=settings.split)}" for position in positions]
    images = list_real_images(settings.url)
    if len(images) < settings.count:
        raise SourceError(f"{settings.url} holds {len(images)} images; {settings.count} are needed")
    return [image.name for image in images[: settings.count]]


def compute_references(
    settings: ReferencesSettings,
    *,
    metrics: MetricSettings,
    url: str,
    names: Sequence[str] | None = None,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to the features of all images; returns its newest version.

    Args:
        settings: of the table.
        metrics: the network.
        url: of the table.
        names: of the images of given captions; None takes those of `image_names`.
        options: see `build_table`.

    Raises:
        SourceError: if there are not as many images.
        TableError: if the table was made with other settings, another network or other images.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    schema = references_schema(features=metrics.feature_count)
    identity = identity_of(settings, metrics=metrics)
    stages = [_stage(settings, metrics=metrics, device=settings.device)]
    pending = partial(pending_units, settings, names=image_names(settings) if names is None else names)
    return build_table(
        url, settings, schema=schema, identity=identity, pending=pending, stages=stages, **options
    )


def pending_units(
    settings: ReferencesSettings, manifests: Sequence[UnitManifest], *, names: Sequence[str]
) -> Iterator[ImageNameRows]:
    """The units that are not committed.

    Raises:
        TableError: if a committed unit was made from other images than those given.
    """
    name, rows = settings.name, settings.rows_per_unit
    check_list(names, manifests, sources=[name], digest=_names_digest)
    units = list_units(names, manifests, source=name, rows_per_unit=rows, digest=_names_digest)
    return (ImageNameRows(unit=unit, names=list(part)) for unit, part in units)


def recomputer(table: Snapshot, *, settings: ReferencesSettings, metrics: MetricSettings) -> Recompute:
    """Recomputes units of REFERENCES for `verify_table`, from the images that their rows name.

    Raises:
        TableError: if the table was made with another network or other settings.
    """
    check_same(table, identity_of(settings, metrics=metrics), "network or other settings")

    def recompute(manifest: UnitManifest, rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        if manifest.rejected():
            raise CannotRecompute("images that could not be read are not in it, and batches depend on them")
        stage = _stage(settings, metrics=metrics, device=device_of(table, manifest))
        return stage.create()(ImageNameRows(unit=Unit.of(manifest), names=rows.column("id").to_pylist()))

    return packed(references_schema(features=metrics.feature_count), recompute)


def _stage(settings: ReferencesSettings, *, metrics: MetricSettings, device: Device) -> PipelineStage:
    cropped = {"images": settings.images, "size": settings.size}
    arguments = {"features": metrics.features, "device": device, **cropped}
    return PipelineStage(build=ExtractFeatures, arguments=arguments, pool=settings.describers)


def moments_of(table: Snapshot) -> Moments:
    """The moments of all rows, merged in float64 in order of the units.

    Raises:
        TableError: if there are no rows.
    """
    parts = [Moments.of(torch.from_numpy(part)) for part in _read_features(table)]
    if not parts:
        raise TableError(f"{table.url} has no committed rows at version {table.version}")
    return reduce(Moments.merge, parts)


def features_of(table: Snapshot, *, limit: int) -> np.ndarray:
    """Features of the first `limit` rows in order of the units, float32 [N,D].

    Raises:
        TableError: if there are no rows.
    """
    parts, count = [], 0
    for part in _read_features(table):
        parts.append(part[: limit - count])
        count += len(parts[-1])
        if count == limit:
            break
    if not count:
        raise TableError(f"{table.url} has no committed rows at version {table.version}")
    return np.concatenate(parts)


def _read_features(table: Snapshot) -> Iterator[np.ndarray]:
    # A copy, because Arrow's memory is read-only.
    return (read_array(table.read_unit(unit, ["features"]), "features").copy() for unit in table.units)


def _names_digest(names: Sequence[str]) -> str:
    # Of the last parts alone, so that the folder may be moved.
    return hashlib.sha256(json.dumps([name.rpartition("/")[2] for name in names]).encode()).hexdigest()
