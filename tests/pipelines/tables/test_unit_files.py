"""A table's files as columns equal the list of its files one by one."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipelines.tables.unit_files import UnitFile, UnitList, revised_name, unit_of

NAMES = [
    *("b-2.parquet", "a-1.parquet", "a.parquet", "b.parquet", "ä-1.parquet", "a.b.parquet"),
    revised_name("b-1", "{}"),
    revised_name("a-0", "{}"),
]
"""In another order than that of their units, of which one begins another."""


def listed(names: list[str]) -> UnitList:
    numbers = pa.array(range(len(names)), pa.int64())
    return UnitList.in_order("s3://bucket/t", names=pa.array(names, pa.string()), rows=numbers, sizes=numbers)


def one_by_one(names: list[str]) -> list[UnitFile]:
    files = [
        UnitFile(unit=unit_of(name), path=f"s3://bucket/t/{name}", rows=number, size=number)
        for number, name in enumerate(names)
    ]
    return sorted(files, key=lambda file: file.unit)


@pytest.mark.parametrize("names", [NAMES, [name for name in NAMES if "~" not in name], []])
def test_files_are_ordered_by_unit(names):
    files, expected = listed(names), one_by_one(names)
    assert list(files) == list(pickle.loads(pickle.dumps(files))) == expected
    assert files.unit_names.to_pylist() == [file.unit for file in expected]
    assert files.num_rows == sum(file.rows for file in expected)


def test_files_are_indexed_as_a_list_is():
    files, expected = listed(NAMES), one_by_one(NAMES)
    assert [files[2], files[-1], *files[1:6:2]] == [expected[2], expected[-1], *expected[1:6:2]]
    assert list(files.take(np.array([3, 0]))) == [expected[3], expected[0]]
    assert expected[4] in files
    with pytest.raises(IndexError, match="8 of 8 units"):
        files[8]
