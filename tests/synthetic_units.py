"""Units without a network, and a run of them that is killed at a named point; started by test_commits."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.rejections import Rejection
from pipelines.stages.write import WriteUnit
from pipelines.tables import commits, committer
from pipelines.tables.commits import WrittenUnit, read_written_unit
from pipelines.tables.committer import commit_stream, recover
from pipelines.tables.manifest import read_manifest, to_parquet
from pipelines.tables.schemas import latents_schema
from pipelines.tables.settings import Bounds
from pipelines.tables.table import create_table, open_table
from pipelines.tables.unit_files import UnitFile, revised_name
from pipelines.tables.units import FinishedRows, Unit, committed_ranges, uncovered_ranges
from snapfusion.settings import digest

SCHEMA = latents_schema(latent_shape=(4, 2, 2), num_tokens=4)
IDENTITY = {"kind": "latents", "model": {"weights": {"vae": "abc"}}, "rows_per_unit": 4}
TOTAL = 22
POINTS = {
    "before_file": (commits, "write_once"),
    "file_to_commit": (committer, "commit_units"),
    "rejects_to_rows": (commits, "_commit_rows"),
    "rows_to_manifests": (commits, "_commit_manifests"),
    "after_commit": (committer, "check_bounds"),
}


def finished(start: int, stop: int, *, final: bool = False) -> FinishedRows:
    """Rows that follow from their ordinals; each fifth is rejected."""
    kept = [n for n in range(start, stop) if n % 5]
    rejections = [
        Rejection(id=f"s/{n}", source="s", reason="broken_image", detail="every fifth", ordinal=n)
        for n in range(start, stop)
        if n % 5 == 0
    ]
    unit = Unit(
        name=f"s-{start:06d}-{stop:06d}", source="s", start=start, stop=stop, final=final, source_digest="d"
    )
    columns = {
        "id": [f"s/{n}" for n in kept],
        "source_id": [f"http://origin/{n}" for n in kept],
        "caption": [f"number {n}" for n in kept],
        "token_ids": np.array([[n] * 4 for n in kept], np.int32),
        "latent": np.array([np.full((4, 2, 2), n) for n in kept], np.float16),
    }
    return FinishedRows(unit=unit, columns=columns, rejections=rejections, environment={"device": "none"})


def run(url: str, *, total: int = TOTAL) -> None:
    """The steps of a job: create or open the table, recover, plan, work, commit."""
    table = recover(create_table(url, schema=SCHEMA, identity=IDENTITY))
    writer = WriteUnit(url=table.url, schema=SCHEMA, settings=digest(table.identity))
    committed = committed_ranges(table.manifests().values(), "s")
    left = uncovered_ranges(total, committed=committed, rows_per_unit=4)

    def work() -> Iterator[WrittenUnit]:
        for part in left:
            yield writer(finished(part.start, part.stop, final=part.final))

    commit_stream(table, work(), bounds=Bounds(commit_seconds=0.0), total=total)


def equal(url: str, other: str) -> bool:
    """Whether two tables have the same rows, rejected rows and manifests."""
    one, two = open_table(url), open_table(other)
    return (
        one.read().equals(two.read())
        and one.manifests() == two.manifests()
        and one.rejected_rows() == two.rejected_rows()
    )


def without_first_row(file: UnitFile) -> tuple[UnitFile, WrittenUnit]:
    """The old file and a new one, written but not committed."""
    manifest, rows = read_manifest(Path(file.path).read_bytes()), pq.read_table(file.path)
    gone = Rejection(id="gone", source="s", reason="broken_image", detail="", ordinal=manifest.start)
    fewer = replace(manifest, rows_written=manifest.rows_written - 1, rejections=(*manifest.rejections, gone))
    path = Path(file.path).with_name(revised_name(file.unit, fewer.to_json()))
    path.write_bytes(to_parquet(rows.slice(1), fewer))
    return file, read_written_unit(str(path))


def kill_at(point: str, *, after: int) -> None:
    """Have this process killed, as by kill -9, the `after`-th time it comes to `point`."""
    module, name = POINTS[point]
    function: Callable = getattr(module, name)
    calls = 0

    def killing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, killing)


if __name__ == "__main__":
    kill_at(sys.argv[2], after=3)
    run(sys.argv[1])
