"""Batches gathered from several units are those of their rows joined."""

import pyarrow as pa
import pytest
import torch
from test_loader import row, table_of

from pipelines.loading.rows import LoaderError, UnitRows, gather, to_batch

TABLES = list(table_of(sizes=(5, 3, 4)).tables.values())
PICKED = [(0, 4), (2, 1), (1, 0), (0, 0), (2, 1), (1, 2)]
"""Unit and row of each row of a batch; one comes twice."""


def gathered(tables, picked=PICKED, *, kept=None):
    units = [UnitRows(table, kept=kept) for table in tables]
    return gather([units[unit] for unit, _ in picked], [row for _, row in picked])


def test_gathered_batch_is_that_of_the_joined_rows():
    joined = pa.concat_tables([TABLES[unit].slice(row, 1) for unit, row in PICKED])
    columns = ["id", "latent", "token_ids", "noise_key", "draw", "image"]
    found, expected = gathered([table.select(columns) for table in TABLES]), to_batch(joined.select(columns))
    assert found.ids == expected.ids
    for name, column in expected.columns.items():
        assert found[name].dtype == column.dtype, name
        assert torch.equal(found[name], column), name


def test_rows_are_counted_among_those_trained_on():
    table = TABLES[0].select(["id", "latent"])
    assert gathered([table], [(0, 0), (0, 1)], kept=[1, 4]).ids == tuple(table["id"].take([1, 4]).to_pylist())


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("latent", None, "row r-6 has no latent"), ("latent", b"\0" * 5, "row 0 has 5 bytes")],
)
def test_unusable_row_is_an_error_where_it_is_used(column, value, named):
    damaged = pa.Table.from_pylist(
        [row("r-5"), {**row("r-6"), column: value}, row("r-7")], schema=TABLES[0].schema
    )
    tables = [table.select(["id", column]) for table in (TABLES[0], damaged)]
    batch = gathered(tables, [(0, 3), (1, 2), (1, 0)])
    assert batch["latent"][:, 0, 0, 0].tolist() == [3 / 8, 7 / 8, 5 / 8]
    with pytest.raises(LoaderError, match=named):
        gathered(tables, [(1, 1), (0, 3)])


def test_values_of_another_shape_are_refused():
    wide = {**row("r-5"), "latent": b"\0" * 2 * 4}
    schema = TABLES[0].schema.set(
        TABLES[0].schema.get_field_index("latent"),
        pa.field("latent", pa.binary(), metadata={"shape": "4,1,1", "dtype": "<f2"}),
    )
    tables = [TABLES[0], pa.Table.from_pylist([wide], schema=schema)]
    with pytest.raises(LoaderError, match="row 1 has 8 bytes"):
        gathered([table.select(["id", "latent"]) for table in tables], [(0, 0), (1, 0)])
