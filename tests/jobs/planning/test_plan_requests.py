"""Counts of storage requests, compared with an S3 server and the real loader."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import s3_server
from synthetic_units import SCHEMA, finished

from pipelines.costs.requests import Requests, TableWrites, TrainingReads
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import WrittenUnit, commit_units
from pipelines.tables.open_log import TableLogs
from pipelines.tables.schemas import ArrayType
from pipelines.tables.table import create_table, open_table
from pipelines.tables.unit_files import UnitFile
from snapfusion.settings import digest

_REQUEST = re.compile(r'"(GET|PUT|POST|HEAD) (\S+) HTTP')
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class Server:
    """An S3 server that logs its requests."""

    def __init__(self, log: Path) -> None:
        self.log, self.read = log, 0

    def requests(self) -> Requests:
        """Requests since the last call."""
        time.sleep(0.2)
        text = self.log.read_text()[self.read :]
        self.read += len(text)
        counts = Counter()
        for verb, path in _REQUEST.findall(_COLORS.sub("", text)):
            counts["LIST" if verb == "GET" and "prefix=" in path else verb] += 1
        return Requests(
            put=counts["PUT"] + counts["POST"], get=counts["GET"] + counts["HEAD"], list=counts["LIST"]
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as output, s3_server(output):
        yield Server(log)


def written(url: str, *, units: int) -> list[WrittenUnit]:
    """Units of one row and one rejected row, written but not committed."""
    table = create_table(url, schema=SCHEMA, identity={"kind": "latents"})
    writer = WriteUnit(url=table.url, schema=SCHEMA, settings=digest(table.identity))
    # Of the two rows of each unit the first is a fifth one, which is rejected.
    return [writer(finished(start, start + 2)) for start in range(0, 5 * units, 5)]


def test_commits_request_as_forecast(server):
    """Six commits of two units, all with rejected rows."""
    files = written("s3://bucket/latents", units=12)
    server.requests()
    logs = TableLogs.of("s3://bucket/latents")
    for start in range(0, len(files), 2):
        commit_units("s3://bucket/latents", files[start : start + 2], logs=logs)
    found = server.requests()
    expected = TableWrites(units=12, commit_seconds=1.0, rejects=True).requests(5.5)
    assert (found.put + len(files), found.list) == (expected.put, expected.list)
    assert found.get == expected.get


def test_a_training_reads_a_unit_in_four_requests(server):
    """A unit as large as those of 512 px in a recipe."""
    url, rows = "s3://bucket/unit.parquet", 64
    schema = pa.schema([("id", pa.string()), ArrayType(shape=(4, 32, 32), dtype="<f2").field("latent")])
    latents = np.zeros((rows, 4, 32, 32), np.float16)
    data = pa.table(
        [pa.array(map(str, range(rows))), pa.array([one.tobytes() for one in latents])], schema=schema
    )
    with fsspec.open(url, "wb") as file:
        pq.write_table(data, file, compression="none", use_dictionary=False, write_page_checksum=True)
    unit = UnitFile(unit="unit", path=url, rows=rows, size=0)
    read = open_table("s3://bucket/latents")
    server.requests()
    assert read.read_unit(unit, ["id", "latent"]).num_rows == rows
    one = TrainingReads(steps=1, global_batch=rows, window_units=1, unit_rows=rows, row_bytes=1.0)
    assert server.requests().get == one.requests(workers=1).get == 4


class CountingTable:
    """A table without numbers that counts what is read of it."""

    def __init__(self, *, units: int, rows: int) -> None:
        self.units = [UnitFile(unit=f"u{n:03d}", path=str(n), rows=rows, size=0) for n in range(units)]
        self.read = 0

    def read_unit(self, unit, columns=None):
        self.read += 1
        ids = [f"{unit.unit}/{row}" for row in range(unit.rows)]
        return pa.table({"id": ids, "n": list(range(unit.rows))}).select(columns or ["id", "n"])


@pytest.mark.parametrize(
    ("workers", "global_batch", "lanes"),
    [
        *((1, 16, 1), (1, 96, 1), (4, 16, 1), (4, 128, 1), (8, 100, 1), (64, 128, 1)),
        *((1, 96, 8), (8, 128, 8), (6, 128, 8)),
    ],
    ids=str,
)
def test_workers_read_units_as_forecast(workers, global_batch, lanes):
    """Windows of 32 rows. The loader reads a little ahead, which is not forecast."""
    steps, read = 40, 0
    for rank in range(workers):
        table = CountingTable(units=50, rows=8)
        settings = LoaderSettings(window_units=4, lanes=lanes)
        loader = BatchLoader(table, columns=["n"], global_batch=global_batch, seed=0, settings=settings)
        batches = loader.batches(0, rank=rank, world=workers, depth=1)
        for _ in range(steps):
            next(batches)
        batches.close()
        read += table.read
    reading = TrainingReads(
        steps=steps,
        global_batch=global_batch,
        window_units=4,
        unit_rows=8,
        row_bytes=1.0,
        lanes=lanes,
    )
    assert read == pytest.approx(reading.units(workers=workers), rel=0.2)


def test_bytes_read_by_workers():
    reading = TrainingReads(
        steps=10,
        global_batch=64,
        window_units=4,
        unit_rows=8,
        row_bytes=100.0,
        checkpoints=2,
        checkpoint_bytes=(1e9, 10.0),
    )
    assert reading.read_bytes(workers=1) == 10 * 64 * 100.0
    # Each of 64 workers takes one row of a step, and reads the file that it lies in, of 8 rows.
    assert reading.read_bytes(workers=64) == 8 * reading.read_bytes(workers=1)
    assert reading.requests(workers=1).put == 2 * (20 + 2 + 1 + 2 + 1)


def test_a_commit_requests_the_same_at_any_length_of_the_log():
    once, twice = (TableWrites(units=n, commit_seconds=0.0).requests(0.0).get for n in (100, 200))
    assert once == 2 * (2 + 6 * 100)
    assert twice - once == 2 * 6 * 100
