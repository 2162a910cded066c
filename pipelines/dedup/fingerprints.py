"""FINGERPRINTS: what tells whether two rows are the same, for every usable row of a set of shards.

shards ─ stream, select, decode, hash ─ data file ─ commit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines.datasets.latents import pending_shards, rows_left
from pipelines.datasets.settings import LatentsSettings
from pipelines.dedup.settings import FingerprintsSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.sources.webdataset import Shard
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.stages.fingerprint import METHOD, FingerprintShard
from pipelines.stages.read import ShardWork
from pipelines.stages.row_filter import RowFilter
from pipelines.stages.settings import ImageBounds
from pipelines.stages.write import WriteUnit, pack
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import FINGERPRINTS
from pipelines.tables.table import Snapshot, create_table
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.settings import digest


def identity_of(
    settings: FingerprintsSettings, *, latents: LatentsSettings, vetoes: Sequence[RowFilter] = ()
) -> dict[str, Any]:
    """Everything that determines the rows of FINGERPRINTS, the shards apart (each unit states its own)."""
    told = {name: value for veto in vetoes for name, value in veto.describe().items()}
    return {
        "kind": "fingerprints",
        "method": METHOD,
        "shards": latents.shards.to_values(),
        "selection": latents.selection.to_values(),
        "images": image_bounds(latents).to_values(),
        "rows_per_unit": settings.rows_per_unit,
        **told,
    }


def fingerprint_shards(
    settings: FingerprintsSettings,
    *,
    latents: LatentsSettings,
    shards: Sequence[Shard],
    source: str,
    url: str,
    vetoes: Sequence[RowFilter] = (),
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to a row for every usable row of `shards`; returns its newest version.

    Args:
        settings: how.
        latents: which rows are usable: as LATENTS will be made. Rows that it would reject anyway have no
            fingerprint, or a copy that is never used would stand in the way of one that is.
        shards: as `list_shards` gives them.
        source: a short name of the set of shards; units and rows are named after it.
        url: of the table.
        vetoes: what refuses rows beside the selection; not that of duplicates, which is made of this.
        origin: who makes the new units, and from what; kept beside their accounts.
        run: what sends shards through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings or other shards of these names.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    identity = identity_of(settings, latents=latents, vetoes=vetoes)
    table = create_table(url, schema=FINGERPRINTS, identity=identity)
    table = recover(table, origin=origin)
    items = list(pending_shards(shards, source=source, accounts=table.manifests().values()))
    stages = [read_stage(settings, latents=latents, vetoes=vetoes), write_stage(table, settings)]
    return commit_stream(
        table,
        run(items, stages),
        bounds=settings.bounds,
        total=rows_left(items) if on_progress else None,
        origin=origin,
        on_progress=on_progress,
    )


def recomputer(
    table: Snapshot, *, shards: Sequence[Shard], source: str, vetoes: Sequence[RowFilter] = ()
) -> Recompute:
    """What `verify_table` needs to make units of FINGERPRINTS again: the shards are read and hashed."""
    settings = FingerprintsSettings(rows_per_unit=table.identity["rows_per_unit"])
    told = {name: table.identity[name] for name in ("shards", "selection", "images")}
    others = [veto for veto in vetoes if not isinstance(veto, DeletionFilter)]
    known = {f"{source}/{shard.name}": shard for shard in shards}

    def make(account: UnitManifest, _rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if account.source not in known:
            raise CannotRecompute(f"its shard {account.source} is not among those given")
        work = ShardWork(shard=known[account.source], source=account.source, committed=((0, account.start),))
        withheld = RecordedDeletionFilter(row.id for row in account.rejections if row.reason == "withheld")
        reader = FingerprintShard(
            **_reader_arguments(settings, LatentsSettings.parse(told), (withheld, *others))
        )
        # A picture that once took a worker down must not take this process down.
        finished = next(reader(work, careful="crashed" in account.rejected()))
        return pack(finished, FINGERPRINTS), finished.environment

    return make


def write_stage(table: Snapshot, settings: FingerprintsSettings) -> PipelineStage:
    """The stage that packs and writes units of this table."""
    arguments = {"url": table.url, "schema": FINGERPRINTS, "settings": digest(table.identity)}
    return PipelineStage(build=WriteUnit, arguments=arguments, pool=settings.writers)


def read_stage(
    settings: FingerprintsSettings, *, latents: LatentsSettings, vetoes: Sequence[RowFilter] = ()
) -> PipelineStage:
    """The stage that reads and hashes shards."""
    return PipelineStage(
        build=FingerprintShard, arguments=_reader_arguments(settings, latents, vetoes), pool=settings.readers
    )


def image_bounds(latents: LatentsSettings) -> ImageBounds:
    """Of how LATENTS are made, what says which pictures are usable; what becomes of them is no part of it."""
    return ImageBounds(min_side=latents.images.min_side, max_pixels=latents.images.max_pixels)


def _reader_arguments(
    settings: FingerprintsSettings, latents: LatentsSettings, vetoes: Sequence[RowFilter]
) -> dict[str, Any]:
    return {
        "rows_per_unit": settings.rows_per_unit,
        "shards": latents.shards,
        "images": image_bounds(latents),
        "selection": latents.selection,
        "vetoes": tuple(vetoes),
    }
