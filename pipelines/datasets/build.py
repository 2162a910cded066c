"""Builds tables: sends the units that are missing through stages and commits them as they finish."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import methodcaller
from typing import Any, TypedDict, TypeVar

import pyarrow as pa

from pipelines.datasets.settings import BuildSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover, take_rows
from pipelines.tables.leases import write_leases
from pipelines.tables.manifest import UnitManifest, in_order
from pipelines.tables.settings import Bounds
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import Unit, committed_ranges, uncovered_ranges
from snapfusion.settings import digest

Row = TypeVar("Row")
Identity = dict[str, Any]
"""Everything that determines the rows of a table, as JSON values; see `create_table`."""


@dataclass(frozen=True, kw_only=True)
class LazyItems:
    """More items than fit in memory: each is planned when it is due.

    Attributes:
        plan: yields them.
        rows: that they give together.
    """

    plan: Callable[[], Iterator[Any]]
    rows: int


Pending = Callable[[list[UnitManifest]], Iterable[Any] | LazyItems]
"""Of the manifests of all committed units, the items to send through the stages."""
CountRows = Callable[[Sequence[Any]], int | None]
"""Rows that items will give; None if unknown."""


class BuildOptions(TypedDict, total=False):
    """Keyword arguments common to all builds; see `build_table`."""

    origin: Origin | None
    run: Runner
    on_progress: OnProgress | None


def build_table(
    url: str,
    settings: BuildSettings,
    *,
    schema: pa.Schema,
    identity: Identity,
    pending: Pending,
    stages: Sequence[PipelineStage],
    count_rows: CountRows | None = None,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Create the table at `url` or complete it; returns its newest version.

    A run may be killed at any time: the next one commits the files that it wrote and makes the others.

    Args:
        url: of the table.
        settings: the writers, and bounds on the run.
        schema: of the table.
        identity: everything that determines the rows.
        pending: gives what is to be made.
        stages: from an item to `FinishedRows`.
        count_rows: rows that items will give, None if unknown; by default the rows of their units.
        origin: job that builds the table, and its parents; recorded with each unit.
        run: sends items through stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with another identity.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    count_rows = count_rows or _rows_in_units
    # Before looking for pending units: files that a killed run finished are not made a second time.
    table = recover(create_table(url, schema=schema, identity=identity), origin=origin)
    manifests = list(table.manifests().values())
    items, total = _taken(pending(manifests), settings.bounds, count_rows, counts=on_progress is not None)
    # The digest goes into every file, so that `recover` refuses files of another identity.
    arguments = {"url": table.url, "schema": schema, "settings": digest(table.identity)}
    # A pool of its own: packing and PNG compression need a CPU, not the model's device.
    write = PipelineStage(build=WriteUnit, arguments=arguments, pool=settings.writers)
    with write_leases([] if items == [] else [table.url], purpose=f"a build of {identity['kind']}"):
        return commit_stream(
            table,
            run(items, [*stages, write]),
            bounds=settings.bounds,
            total=total,
            origin=origin,
            on_progress=on_progress,
        )


def _taken(
    pending: Iterable[Any] | LazyItems, bounds: Bounds, count_rows: CountRows, *, counts: bool
) -> tuple[Iterable[Any], int | None]:
    """The items that a run takes, and their rows if those are known; without `counts` they need not be."""
    planned = pending.plan() if isinstance(pending, LazyItems) else pending
    taken = take_rows(planned, bounds=bounds, rows=lambda item: count_rows([item]))
    if isinstance(pending, LazyItems) and pending.rows > 0:
        return taken, min(pending.rows, bounds.max_rows or pending.rows)
    items = list(taken)
    # Counting may cost a round trip to the store for each shard.
    return items, count_rows(items) if counts else None


def model_stage(
    build: Callable[..., Any], arguments: dict[str, Any], *, pool: Pool, schema: pa.Schema
) -> PipelineStage:
    """A stage with a model; a unit that kills every worker that tries it is rejected as a whole."""
    reject_all = methodcaller("reject_all", schema.names)
    return PipelineStage(build=build, arguments=arguments, pool=pool, give_up=reject_all)


def list_units(
    rows: Sequence[Row],
    manifests: Sequence[UnitManifest],
    *,
    source: str,
    rows_per_unit: int,
    digest: Callable[[Sequence[Row]], str],
) -> Iterator[tuple[Unit, Sequence[Row]]]:
    """The units of a list that are not committed, each with its rows; see `check_list`.

    Args:
        rows: the list; it may have grown at its end since units of it were committed.
        manifests: of all committed units.
        source: name of the list.
        rows_per_unit: of one unit.
        digest: of some rows of the list.
    """
    committed = committed_ranges(manifests, source)
    # Units are cut at fixed ordinals: a list that grows at its end leaves its earlier units as they are.
    for span in uncovered_ranges(len(rows), committed=committed, rows_per_unit=rows_per_unit):
        part = rows[span.start : span.stop]
        name = f"{source}-{span.start:09d}-{span.stop:09d}"
        yield Unit(name=name, source=source, source_digest=digest(part), **asdict(span)), part


def check_list(
    rows: Sequence[Row],
    manifests: Iterable[UnitManifest],
    *,
    sources: Collection[str],
    digest: Callable[[Sequence[Row]], str],
) -> None:
    """Check that the committed units of a list were made from the rows that it has, before others are made.

    Args:
        rows: the list; it is read once from its beginning, as far as there are units.
        manifests: of all committed units.
        sources: names of the list, one for each time that it is used.
        digest: of some rows of the list.

    Raises:
        TableError: if a committed unit was made from other rows.
    """
    known: dict[tuple[int, int], str] = {}
    for manifest in in_order(manifest for manifest in manifests if manifest.source in sources):
        span = (manifest.start, manifest.stop)
        if span not in known:
            known = {span: digest(rows[manifest.start : manifest.stop])}
        if known[span] != manifest.source_digest:
            raise TableError(
                f"unit {manifest.unit} was made from other rows than {manifest.start} .. {manifest.stop} of "
                "the list given; give the same list (it may grow at its end), or a new table"
            )


def _rows_in_units(items: Sequence[Any]) -> int:
    return sum(item.unit.rows_read for item in items)
