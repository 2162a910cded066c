"""Rows to train on are counted by the keys that are kept with the units, as by the files' own ids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_units
from synthetic_units import SCHEMA, finished, without_first_row

from pipelines.loading.buckets import count_by_shape
from pipelines.loading.loader import count_trainable
from pipelines.loading.unit_counts import count_rows_to_train
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import commit_units, replace_units
from pipelines.tables.row_keys import LARGEST_FRACTION, RowKeys
from pipelines.tables.schemas import latents_schema
from pipelines.tables.table import Snapshot, create_table, open_table
from pipelines.tables.units import FinishedRows, Unit

FRACTIONS = (0.0, 0.001, 0.03, LARGEST_FRACTION, 0.3)
UNITS, ROWS = 6, 200
SHAPES = [(16, 16), (8, 24), (24, 8)]


def of_unit(number: int, *, bucketed: bool) -> FinishedRows:
    ids = [f"s/{number}-{row}" for row in range(ROWS)]
    name = f"s-{number:06d}"
    start = number * ROWS
    unit = Unit(name=name, source="s", start=start, stop=start + ROWS, final=False, source_digest="")
    columns = {"id": ids, "source_id": ids, "caption": ids, "token_ids": np.zeros((ROWS, 4), np.int32)}
    columns["latent"] = np.zeros((ROWS, 4, 2, 2), np.float16)
    if bucketed:
        # The last unit has rows of one shape only.
        shapes = [SHAPES[row % 3 if number < UNITS - 1 else 0] for row in range(ROWS)]
        columns["latent"] = [np.zeros((4, height // 8, width // 8), np.float16) for height, width in shapes]
        columns["height"], columns["width"] = zip(*shapes, strict=True)
    return FinishedRows(unit=unit, columns=columns, rejections=[])


@pytest.fixture(scope="module", params=[False, True], ids=["one shape", "buckets"])
def table(request, tmp_path_factory) -> Snapshot:
    folder = tmp_path_factory.mktemp("tables") / "latents"
    buckets = {"max_aspect": 3.0} if request.param else None
    schema = latents_schema(latent_shape=(4, 2, 2), num_tokens=4, cell=8 if request.param else None)
    identity = {"kind": "latents", "images": {"buckets": buckets}}
    made = create_table(str(folder), schema=schema, identity=identity)
    writer = WriteUnit(url=made.url, schema=schema, settings="s")
    commit_units(made.url, [writer(of_unit(number, bucketed=request.param)) for number in range(UNITS)])
    return open_table(made.url)


def counted_in_files(table: Snapshot, *, held_out: float) -> list:
    bucketed = "height" in table.columns
    return (count_by_shape if bucketed else count_trainable)(table, held_out=held_out)


@pytest.mark.parametrize("held_out", FRACTIONS)
def test_counts_are_those_of_the_files(table, held_out):
    assert list(count_rows_to_train(table, held_out=held_out)) == counted_in_files(table, held_out=held_out)


@pytest.mark.parametrize("held_out", FRACTIONS[:-1])
def test_no_data_file_is_opened(table, held_out, monkeypatch):
    monkeypatch.setattr(Snapshot, "read_unit", None)
    counts = count_rows_to_train(table, held_out=held_out)
    assert len(counts) == UNITS


def test_rows_of_earlier_versions_are_counted_in_their_files(tmp_path, monkeypatch):
    url = str(tmp_path / "latents")
    with monkeypatch.context() as patch:
        # Version 0.1 wrote neither the keys nor the name of the file.
        earlier = pa.schema(list(synthetic_units.commits.UNITS)[:-3])
        patch.setattr(synthetic_units.commits, "UNITS", earlier)
        synthetic_units.run(url, total=12)
    [path, *_] = Path(f"{url}.units").glob("*.parquet")
    assert "file" not in pq.read_schema(path).names
    synthetic_units.run(url)
    table = open_table(url)
    table.identity["images"] = {}
    read = []
    monkeypatch.setattr(
        Snapshot, "read_unit", lambda self, unit, columns: read.append(unit.unit) or pq.read_table(unit.path)
    )
    counts = count_rows_to_train(table, held_out=LARGEST_FRACTION)
    assert read == [file.unit for file in table.units[:3]]
    assert counts == count_trainable(table, held_out=LARGEST_FRACTION)


def test_replaced_file_has_its_own_count(tmp_path):
    table = create_table(str(tmp_path / "latents"), schema=SCHEMA, identity={"kind": "pairs"})
    rows = finished(0, 400)
    commit_units(table.url, [WriteUnit(url=table.url, schema=SCHEMA, settings="s")(rows)])
    before = open_table(table.url)
    replace_units(table.url, [without_first_row(before.units[0])])
    after = open_table(table.url)
    for snapshot in (before, after):
        assert count_rows_to_train(snapshot, held_out=0.02) == count_trainable(snapshot, held_out=0.02)


def test_tables_that_no_training_reads_keep_no_keys():
    assert RowKeys.of_rows(pa.table({"id": ["a"], "clip": [0.5]})) is None
