"""Plans the reading of shards: what of them is not committed, and how many rows that will give."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.sources.webdataset import Shard, count_rows
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.stages.row_filter import RowFilter
from pipelines.stages.shard_work import ShardWork, TornUnit, shard_digest
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.manifest import UnitManifest, covers_source, in_order
from pipelines.tables.table import TableError
from pipelines.tables.units import committed_ranges
from pipelines.tables.verification import CannotRecompute

OnRefused = Callable[[str], None]
"""Receives a line on each shard that is not the one that its committed units were read from."""

_MAX_COUNTED_SHARDS = 256
"""Shards whose row counts are read for a progress total; the others are extrapolated."""

_FAILURES = ("download_failed", "resize_failed")
_NOT_IN_TAR = {*_FAILURES, "torn_shard", "not_a_shard", "changed_shard", "missing_sample", "bad_sidecar"}


def pending_shards(
    shards: Sequence[Shard],
    manifests: Iterable[UnitManifest],
    *,
    source: str,
    max_refused: float = 0.0,
    on_refused: OnRefused | None = None,
) -> list[ShardWork]:
    """The shards that are not wholly committed, each with its committed ranges.

    A shard that was torn and has changed since is read on after the tear. One that was whole and has changed
    is refused, and the others go on.

    Args:
        shards: all of them.
        manifests: of all committed units.
        source: the short name of the set of shards.
        max_refused: largest fraction of the shards that may be refused.
        on_refused: called for each refused shard; None allows none.

    Raises:
        TableError: if more shards are refused; names the first.
    """
    by_source = group_by_source(manifests)
    pending: list[ShardWork] = []
    refused: list[str] = []
    for shard in shards:
        name = f"{source}/{shard.name}"
        try:
            work = _work(shard, by_source[name], source=name)
        except TableError as error:
            refused.append(str(error))
        else:
            pending += [work] if work else []
    if len(refused) > max_refused * len(shards) or (refused and on_refused is None):
        others = f"; {len(refused) - 1} other shards have changed too" if len(refused) > 1 else ""
        raise TableError(f"{refused[0]}; give the set of shards another source name{others}")
    if on_refused is not None:
        for line in refused:
            on_refused(line)
    return pending


def group_by_source(manifests: Iterable[UnitManifest]) -> Mapping[str, list[UnitManifest]]:
    """The units of each source."""
    by_source: dict[str, list[UnitManifest]] = defaultdict(list)
    for manifest in manifests:
        by_source[manifest.source].append(manifest)
    return by_source


def _work(shard: Shard, units: Sequence[UnitManifest], *, source: str) -> ShardWork | None:
    """What is left to read of a shard, of which `units` are committed; None if it is done.

    Raises:
        TableError: if it is another shard than they were read from.
    """
    digest = shard_digest(shard)
    earlier = [unit for unit in in_order(units) if unit.source_digest != digest]
    if covers_source(units) and in_order(units)[-1].source_digest == digest:
        return None
    parent = _torn_unit(earlier[-1], units) if earlier else None
    if earlier and parent is None:
        raise TableError(
            f"{shard.url} is not the shard that unit {earlier[0].unit} was read from: its size differs"
        )
    return ShardWork(
        shard=shard, source=source, committed=tuple(committed_ranges(units, source)), parent=parent
    )


def _torn_unit(unit: UnitManifest, units: Iterable[UnitManifest]) -> TornUnit | None:
    """The unit as one after which a shard can be read on; None if the shard was not torn there."""
    if unit.tear is None:
        return None
    read = (other for other in units if other.source == unit.source and other.stop <= unit.stop)
    rejections = (rejection for other in read for rejection in other.rejections)
    failed = frozenset(rejection.id for rejection in rejections if rejection.reason in _FAILURES)
    return TornUnit(name=unit.unit, stop=unit.stop, tear=unit.tear, failed=failed)


def replayed_shard(
    manifest: UnitManifest,
    *,
    shards: Mapping[str, Shard],
    manifests: Mapping[str, UnitManifest],
    filters: Sequence[RowFilter],
) -> tuple[ShardWork, tuple[RowFilter, ...], bool]:
    """The work, filters and isolation that read a unit's rows from its shard as they were first read.

    Args:
        manifest: of the unit.
        shards: by source.
        manifests: of all units of the table, by name.
        filters: those of the table.

    Raises:
        CannotRecompute: if the unit's shard is not among `shards`, by name, or was torn when it was read.
    """
    if manifest.source not in shards:
        raise CannotRecompute(f"its shard {manifest.source} is not among those given")
    shard = shards[manifest.source]
    # Rows after a tear have other ordinals once the shard is whole.
    if manifest.source_digest != shard_digest(shard) and not _NOT_IN_TAR.isdisjoint(manifest.rejected()):
        raise CannotRecompute(f"its shard {manifest.source} was torn then, and has changed since")
    parent = None
    if manifest.parent is not None:
        parent = _torn_unit(manifests[manifest.parent], manifests.values())
    # Starting at the unit's first row: the reader gives this unit first.
    committed = ((0, manifest.start),)
    work = ShardWork(shard=shard, source=manifest.source, committed=committed, parent=parent)
    # The deletion list may have grown since; what was withheld then is in the manifest.
    withheld = RecordedDeletionFilter(row.id for row in manifest.rejections if row.reason == "withheld")
    others = [row_filter for row_filter in filters if not isinstance(row_filter, DeletionFilter)]
    isolate = bool({"crashed", "timed_out"} & manifest.rejected().keys())
    return work, (withheld, *others), isolate


def rows_left(items: Sequence[ShardWork]) -> int | None:
    """Rows still to be read, by the counts in the sidecars; None if a shard has no sidecar.

    Each count is a round trip to the store, so of very many shards only some are counted, and the others are
    taken to have as many rows to a byte.
    """
    counted = items[:: len(items) // _MAX_COUNTED_SHARDS + 1]
    with ThreadPoolExecutor(IO_THREADS) as threads:
        counts = list(threads.map(count_rows, [work.shard for work in counted]))
    if None in counts:
        return None
    rows = sum(count for count in counts if count is not None)
    # By bytes, because shards of one set may differ much in rows.
    share = sum(work.shard.size for work in items) / max(sum(work.shard.size for work in counted), 1)
    committed = sum(stop - start for work in items for start, stop in work.committed)
    return max(round(rows * share) - committed, 0)
