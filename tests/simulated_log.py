"""Writes the logs of a table of very many units, without the data files that they name; for measurements."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from pipelines.tables.row_keys import LARGEST_FRACTION, least_key
from pipelines.tables.schemas import UNITS
from pipelines.tables.transactions import add_rows, try_commit

ROWS_PER_UNIT = 32
UNIT_BYTES = 1_100_000
_ROWS_PER_FILE = 76_800
"""Rows of a file of `.units` that has been merged twice, with 75 units a commit."""


def simulated_units(count: int) -> Iterator[str]:
    """Names of units as those of a caption list or of shards, as workers might end them."""
    for number in range(count):
        # Each eight units arrive in the opposite order.
        turned = number // 8 * 8 + 7 - number % 8
        start = (turned if turned < count else number) * ROWS_PER_UNIT
        yield f"simulated-d0000-{start:09d}-{start + ROWS_PER_UNIT:09d}"


def write_log(table: str, *, commits: int, units: int) -> None:
    """Append `commits` entries with together `units` data files to the log of a table at version 0.

    A checkpoint stands where deltalake makes the last one: it makes one after each hundred entries.
    """
    log, names = Path(table) / "_delta_log", simulated_units(units)
    for version in range(1, commits + 1):
        lines = []
        for _ in range(units * version // commits - units * (version - 1) // commits):
            name = next(names)
            lines.append(json.dumps({"add": _add(name)}))
            lines.append(json.dumps({"txn": {"appId": f"unit:{name}", "version": 1}}))
        (log / f"{version:020d}.json").write_text("\n".join(lines) + "\n")
        if version == commits // 100 * 100:
            DeltaTable(table).create_checkpoint()


def write_units(table: str, *, units: int) -> None:
    """Fill `.units` with one row a unit, in files that have been merged."""
    names = pa.array(list(simulated_units(units)))
    for first in range(0, units, _ROWS_PER_FILE):
        rows = add_rows(
            f"{table}.units",
            _records(names[first : first + _ROWS_PER_FILE]),
            prefix="merged-2-",
            compression="zstd",
        )
        try_commit(DeltaTable(f"{table}.units"), f"{table}.units", [rows], [])


def _records(names: pa.Array) -> pa.Table:
    count = len(names)
    draws = np.random.Generator(np.random.Philox(count))
    # On average two of a unit's rows are among those whose keys are kept.
    keys = draws.integers(least_key(LARGEST_FRACTION), 2**63 - 1, (count, 2), np.int64, endpoint=True)
    accounts = [
        json.dumps({"unit": name, "source": "simulated-d0000", "settings": "0" * 64, "rejections": []})
        for name in names.to_pylist()
    ]
    digits = np.frombuffer(draws.bytes(32 * count).hex().encode(), "S64").astype(str)
    columns = {
        "unit": names,
        "source": pa.array(["simulated-d0000"] * count),
        "account": pa.array(accounts),
        **{name: pa.array(np.full(count, ROWS_PER_UNIT)) for name in ("rows_read", "rows_written")},
        "rows_rejected": pa.array(np.zeros(count, np.int64)),
        "bytes": pa.array(np.full(count, UNIT_BYTES)),
        "sha256": pa.array(digits),
        "seconds": pa.array(np.ones(count)),
        "made_by": pa.nulls(count, pa.string()),
        "file": pa.array([f"{name}.parquet" for name in names.to_pylist()]),
        "held_out_keys": pa.array([row.tobytes() for row in keys], pa.binary()),
        "shapes": pa.nulls(count, pa.binary()),
    }
    return pa.table(columns, schema=UNITS)


def _add(name: str) -> dict:
    return {
        "path": f"{name}.parquet",
        "size": UNIT_BYTES,
        "partitionValues": {},
        "modificationTime": 1_700_000_000_000,
        "dataChange": True,
        "stats": json.dumps({"numRecords": ROWS_PER_UNIT}),
    }
