"""FINGERPRINTS: keys and hashes by which duplicates are found, for every usable row of a set of shards.

shards ─ stream, select, decode, hash ─ data file ─ commit
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import pyarrow as pa

from pipelines.datasets.build import BuildOptions, build_table
from pipelines.datasets.recompute import packed
from pipelines.datasets.settings import LatentsSettings
from pipelines.datasets.shard_plan import OnRefused, pending_shards, replayed_shard, rows_left
from pipelines.dedup.settings import FingerprintsSettings
from pipelines.ray_data.execution import PipelineStage
from pipelines.sources.webdataset import Shard
from pipelines.stages.fingerprint import METHOD, FingerprintShard
from pipelines.stages.row_filter import RowFilter, describe_filters
from pipelines.stages.settings import ImageBounds
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import FINGERPRINTS
from pipelines.tables.table import Snapshot
from pipelines.tables.units import FinishedRows
from pipelines.tables.verification import Recompute


def identity_of(
    settings: FingerprintsSettings, *, latents: LatentsSettings, filters: Sequence[RowFilter] = ()
) -> dict[str, Any]:
    """Everything that determines the rows of FINGERPRINTS but the shards, which each unit records."""
    return {
        "kind": "fingerprints",
        "method": METHOD,
        "shards": latents.shards.to_values(),
        "selection": latents.selection.to_values(),
        "images": image_bounds(latents).to_values(),
        "rows_per_unit": settings.rows_per_unit,
        **describe_filters(filters),
    }


def fingerprint_shards(
    settings: FingerprintsSettings,
    *,
    latents: LatentsSettings,
    shards: Sequence[Shard],
    source: str,
    url: str,
    filters: Sequence[RowFilter] = (),
    on_refused: OnRefused | None = None,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to a row for every usable row of `shards`; returns its newest version.

    Args:
        settings: of the table.
        latents: settings of the LATENTS to come. Rows that they reject have no fingerprint: a duplicate that
            is never used must not exclude one that is.
        shards: as `list_shards` gives them.
        source: a short name of the set of shards; prefix of the names of units and rows.
        url: of the table.
        filters: reject rows beside the selection; without that of duplicates, which is made from this table.
        on_refused: called for each shard that is not the one that its committed units were read from.
        options: see `build_table`.

    Raises:
        TableError: if the table was made with other settings, or if more shards are refused than
            `bounds.max_rejected_shards` allows.
        TooManyRejected: when the rejected fraction of rows or shards exceeds its bound.
    """
    return build_table(
        url,
        settings,
        schema=FINGERPRINTS,
        identity=identity_of(settings, latents=latents, filters=filters),
        pending=partial(
            pending_shards,
            shards,
            source=source,
            max_refused=settings.bounds.max_rejected_shards,
            on_refused=on_refused,
        ),
        stages=[read_stage(settings, latents=latents, filters=filters)],
        count_rows=rows_left,
        **options,
    )


def recomputer(
    table: Snapshot, *, shards: Sequence[Shard], source: str, filters: Sequence[RowFilter] = ()
) -> Recompute:
    """Recomputes units of FINGERPRINTS for `verify_table`: reads their shards again and hashes them."""
    settings = FingerprintsSettings(rows_per_unit=table.identity["rows_per_unit"])
    latents = LatentsSettings.parse({key: table.identity[key] for key in ("shards", "selection", "images")})
    sources = {f"{source}/{shard.name}": shard for shard in shards}
    manifests = table.manifests()

    def recompute(manifest: UnitManifest, _rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        work, recorded, isolate = replayed_shard(
            manifest, shards=sources, manifests=manifests, filters=filters
        )
        read = read_stage(settings, latents=latents, filters=recorded).create()
        finished: FinishedRows = next(read(work, isolate=isolate))
        return finished

    return packed(FINGERPRINTS, recompute)


def read_stage(
    settings: FingerprintsSettings, *, latents: LatentsSettings, filters: Sequence[RowFilter] = ()
) -> PipelineStage:
    """The stage that reads and hashes shards."""
    arguments = {
        "rows_per_unit": settings.rows_per_unit,
        "shards": latents.shards,
        "images": image_bounds(latents),
        "selection": latents.selection,
        "decode_seconds": latents.decode_seconds,
        "filters": tuple(filters),
    }
    return PipelineStage(build=FingerprintShard, arguments=arguments, pool=settings.readers)


def image_bounds(latents: LatentsSettings) -> ImageBounds:
    """The settings of LATENTS that decide which images are usable; cropping is no part of them."""
    return ImageBounds(min_side=latents.images.min_side, max_pixels=latents.images.max_pixels)
