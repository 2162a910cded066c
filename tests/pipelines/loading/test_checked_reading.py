"""Reading a table with its files checked, and without, in turn; part of `make bench`."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from table_damage import without_page_checksums

from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.write import WriteUnit
from pipelines.tables import integrity, manifest
from pipelines.tables.commits import commit_units
from pipelines.tables.schemas import latents_schema
from pipelines.tables.settings import CHECK_FILES_VARIABLE
from pipelines.tables.table import Snapshot, create_table, open_table
from pipelines.tables.units import FinishedRows, Unit

UNITS, ROWS, ROUNDS, SIDE = 16, 128, 9, 64
"""Latents of SD-v1.5, 4 MB a unit."""

MOST = {"page checksums": 1.5, "SHA-256 of older files": 1.8}
"""Largest ratio of the CPU time with checks to that without."""

SCHEMA = latents_schema(latent_shape=(4, SIDE, SIDE), num_tokens=77)
IDENTITY = {"kind": "latents"}


def finished(number: int, *, rows: int) -> FinishedRows:
    start = number * rows
    draws = np.random.Generator(np.random.Philox(number))
    unit = Unit(
        name=f"s-{number:06d}", source="s", start=start, stop=start + rows, final=False, source_digest=""
    )
    ids = [f"s/{n}" for n in range(start, start + rows)]
    columns = {
        "id": ids,
        "source_id": ids,
        "caption": [f"a picture with the number {n}" for n in range(rows)],
        "token_ids": draws.integers(0, 49_408, (rows, 77), np.int32),
        "latent": draws.standard_normal((rows, 4, SIDE, SIDE), np.float32).astype(np.float16),
    }
    return FinishedRows(unit=unit, columns=columns, rejections=[])


def make(folder: Path, *, units: int = UNITS, rows: int = ROWS) -> Snapshot:
    table = create_table(str(folder), schema=SCHEMA, identity=IDENTITY)
    writer = WriteUnit(url=table.url, schema=SCHEMA, settings="")
    commit_units(table.url, [writer(finished(number, rows=rows)) for number in range(units)])
    return open_table(table.url)


@pytest.fixture(params=MOST)
def table(request, tmp_path: Path, monkeypatch) -> Snapshot:
    with monkeypatch.context() as patch:
        if request.param != "page checksums":
            patch.setattr(manifest.pq, "write_table", without_page_checksums)
        made = make(tmp_path / "latents")
    data = Path(made.units[0].path).read_bytes()
    assert integrity.has_page_checksums(data) == (request.param == "page checksums")
    return made


def seconds(table: Snapshot) -> tuple[float, float]:
    """Wall and CPU time of an epoch's batches in a process that has read nothing yet."""
    integrity._checked.clear()
    settings = LoaderSettings(window_units=8)
    batches = BatchLoader(
        open_table(table.url), columns=("latent", "token_ids"), global_batch=ROWS, seed=0, settings=settings
    )
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in itertools.islice(batches.stream(0), UNITS):
        pass
    return time.perf_counter() - wall, time.process_time() - cpu


@pytest.mark.slow
def test_checks_cost_little(request, table, monkeypatch, capsys):
    kind = request.node.callspec.params["table"]
    seconds(table)
    ratios = []
    # In turn, since the machine drifts.
    for _ in range(ROUNDS):
        checked = seconds(table)
        with monkeypatch.context() as patch:
            patch.setenv(CHECK_FILES_VARIABLE, "0")
            ratios.append(np.divide(checked, seconds(table)))
    wall, cpu = np.median(ratios, axis=0)
    with capsys.disabled():
        print(f"\n{kind}: {wall:.3f} of the loading time, {cpu:.3f} of the CPU time without", end="")
    # Wall time depends on what else the machine does.
    assert cpu <= MOST[kind]
