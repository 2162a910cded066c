"""Start of a training and cost of a commit as a table grows; simulated logs, part of `make bench`."""

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable, Transaction
from simulated_log import ROWS_PER_UNIT, UNIT_BYTES, write_log, write_units
from synthetic_units import SCHEMA

from pipelines.loading.unit_counts import count_rows_to_train
from pipelines.tables.commits import WrittenUnit, commit_units
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.open_log import TableLogs
from pipelines.tables.row_keys import RowKeys
from pipelines.tables.table import Snapshot, create_table, open_delta
from pipelines.tables.transactions import add_file, try_commit

pytestmark = pytest.mark.slow

SIZES = [(200, 1_000), (1_000, 75_000), (5_000, 375_000), (20_000, 1_500_000)]
"""Commits and units."""

IDENTITY = {"kind": "pairs"}
HELD_OUT = 0.01
WORKER_MIB, START_SECONDS, COMMIT_SECONDS = 200, 2.5, 0.02

WORKER = """
import pickle, sys, time
from pathlib import Path
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
import pyarrow.compute, pipelines.tables.table
def mebibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before, began = mebibytes("VmRSS"), time.perf_counter()
table, counts = pickle.loads(Path(sys.argv[1]).read_bytes())
options = {"columns": ("latent",), "global_batch": 2048, "settings": LoaderSettings(held_out=0.01)}
loader = BatchLoader(table, seed=0, counts=counts, **options)
next(loader._order.batches(0, rows=2048))
print(time.perf_counter() - began, mebibytes("VmHWM") - before)
"""


def seconds(work: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Wall and CPU seconds of some work, float64 [2], and its result."""
    began = np.array([time.perf_counter(), time.process_time()])
    result = work()
    return np.array([time.perf_counter(), time.process_time()]) - began, result


def shown(times: np.ndarray) -> str:
    return f"{times[0]:.3f} s (CPU {times[1]:.3f})"


def written(table: str) -> Iterator[WrittenUnit]:
    """Units of which only the commit is measured: without data files."""
    number = 0
    while True:
        number += 1
        manifest = UnitManifest(
            source="s",
            start=number,
            stop=number + ROWS_PER_UNIT,
            final=False,
            source_digest="",
            unit=f"later-{number:06d}",
            settings="s",
            environment={},
            rows_read=ROWS_PER_UNIT,
            rows_written=ROWS_PER_UNIT,
        )
        yield WrittenUnit(
            manifest=manifest,
            path=f"{table}/{manifest.unit}.parquet",
            size=UNIT_BYTES,
            sha256="0" * 64,
            seconds=1.0,
            row_keys=RowKeys(keys=b"", shapes=None),
        )


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[1]} units")
def simulated(request, tmp_path_factory) -> tuple[int, str]:
    commits, units = request.param
    url = create_table(str(tmp_path_factory.mktemp("large") / "pairs"), schema=SCHEMA, identity=IDENTITY).url
    write_log(url, commits=commits, units=units)
    write_units(url, units=units)
    return units, url


def test_start_of_a_training(simulated, tmp_path, capsys):
    units, url = simulated
    opening, delta = seconds(lambda: open_delta(url))
    listing, table = seconds(partial(Snapshot, url, delta))
    ordering, _ = seconds(lambda: table.units)
    opening_units, _ = seconds(lambda: table._units_delta)
    counting, counts = seconds(lambda: count_rows_to_train(table, held_out=HELD_OUT))
    assert len(counts) == units
    pickling, packed = seconds(lambda: pickle.dumps((table, counts)))
    (tmp_path / "inputs").write_bytes(packed)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "inputs")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    worker, mebibytes = map(float, done.stdout.split())
    with capsys.disabled():
        print(
            f"\n{units} units: logs open after {shown(opening + opening_units)}, their files listed after "
            f"{shown(listing)}; ordered in {shown(ordering)}, counted in {shown(counting)}, packed in "
            f"{shown(pickling)}, {len(packed) / 2**20:.1f} MiB; a worker: {worker:.2f} s, {mebibytes:.0f} MiB"
        )
    # In CPU time: wall time depends on what else the machine does.
    assert (ordering + counting + pickling)[1] <= START_SECONDS
    assert mebibytes <= WORKER_MIB


def test_commit_of_one_unit(simulated, capsys):
    units, url = simulated
    given, logs = written(url), TableLogs.of(url)

    def by_deltalake() -> None:
        name = f"own-{time.time_ns()}"
        added = add_file(f"{name}.parquet", size=UNIT_BYTES, rows=ROWS_PER_UNIT)
        assert try_commit(DeltaTable(url), url, [added], [Transaction(f"unit:{name}", 1)])

    first, _ = seconds(lambda: commit_units(url, [next(given)], logs=logs))
    own, ours = [], []
    # In turn, since the machine drifts.
    for _ in range(5):
        own.append(seconds(by_deltalake)[0])
        ours.append(seconds(lambda: commit_units(url, [next(given)], logs=logs))[0])
    own_median, our_median = np.median(own, axis=0), np.median(ours, axis=0)
    with capsys.disabled():
        print(
            f"\n{units} units: deltalake opens and commits in {shown(own_median)}, a commit with open logs "
            f"takes {shown(our_median)}, the first {shown(first)}"
        )
    assert our_median[1] <= own_median[1] + COMMIT_SECONDS
