"""Rows of a sidecar are matched with samples whatever their keys' type, or samples are rejected."""

import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import corrupt, encoded, outcomes, read, write_tar

from pipelines.sources.sidecar import read_sidecar
from pipelines.sources.webdataset import Sample, Shard

KEYS = ["000000007", "000000012"]


def shard_of(folder: Path, *names: str) -> Shard:
    """A tar of samples with these names, without .json."""
    members = [(f"{name}.{end}", data) for name in names for end, data in (("jpg", encoded()), ("txt", b"a"))]
    return write_tar(folder / "s.tar", members)


def write_sidecar(folder: Path, keys: Any, **columns: Any) -> None:
    pq.write_table(pa.table({"key": keys, **columns}), folder / "s.parquet")


@pytest.mark.parametrize(
    "keys",
    [
        KEYS,
        [b"000000007", b"000000012"],
        [7, 12],
        [7.0, 12.0],
        pa.array(KEYS).dictionary_encode(),
        pa.array(KEYS, pa.string_view()),
        pa.array(KEYS).cast(pa.binary_view()),
    ],
)
@pytest.mark.parametrize("folder", ["", "./", "images/"])
def test_keys_of_any_type_find_their_scores(tmp_path: Path, keys: Any, folder: str) -> None:
    shard = shard_of(tmp_path, *(f"{folder}{key}" for key in KEYS))
    write_sidecar(tmp_path, keys, punsafe=[0.25, 0.5])
    rows = read(shard)
    assert [row.metadata["punsafe"] for row in rows if isinstance(row, Sample)] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("names", "keys", "expected"),
    [
        (["a", "b"], ["a", "c"], "ok bad_sidecar missing_sample"),
        (["a", "b"], ["a", "b", "b"], "ok bad_sidecar duplicate_key"),
        (["a"], ["a", None, ""], "ok bad_sidecar bad_sidecar"),
        (["1", "01"], [1], "ok bad_sidecar"),
        (["x/1", "y/1"], ["1"], "ok bad_sidecar"),
        (["x/1", "y/1"], ["x/1", "y/1"], "ok ok"),
        (["1"], [1.5], "bad_sidecar bad_sidecar"),
        (["1"], [[1]], "bad_sidecar bad_sidecar"),
    ],
)
def test_samples_without_their_own_row_are_rejected(
    tmp_path: Path, names: list[str], keys: list[Any], expected: str
) -> None:
    shard = shard_of(tmp_path, *names)
    write_sidecar(tmp_path, keys)
    assert outcomes(read(shard)) == expected.split()


def test_a_json_replaces_a_missing_row(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", encoded()), ("a.txt", b"a"), ("a.json", b"{}")])
    write_sidecar(tmp_path, ["b"])
    assert outcomes(read(shard)) == ["ok", "missing_sample"]


def test_a_damaged_page_makes_a_sidecar_unreadable(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a")
    write_sidecar(tmp_path, ["a"], punsafe=[0.5])
    corrupt(tmp_path / "s.parquet", group=0, column="punsafe")
    assert outcomes(read(shard)) == ["bad_sidecar", "bad_sidecar"]


def test_columns_of_one_name_must_agree(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a")
    for other, expected in ((0.5, ["ok"]), (None, ["ok"]), (0.1, ["bad_sidecar"] * 2)):
        columns = [pa.array(["a"]), pa.array([0.5]), pa.array([other])]
        pq.write_table(pa.Table.from_arrays(columns, ["key", "punsafe", "punsafe"]), tmp_path / "s.parquet")
        assert outcomes(read(shard)) == expected


@pytest.mark.parametrize("values", ["repeated", "different"])
def test_a_sidecar_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, values):
    monkeypatch.setattr("pipelines.sources.sidecar._MAX_BYTES", 1 << 20)
    rows = 4_000
    texts = ["x" * 2_000 + (str(row) if values == "different" else "") for row in range(rows)]
    table = pa.table({"key": [f"{row:04d}" for row in range(rows)], "caption": texts})
    pq.write_table(table, tmp_path / "s.parquet", compression="zstd", use_dictionary=values == "repeated")
    assert (tmp_path / "s.parquet").stat().st_size < 100_000
    sidecar, fault = read_sidecar(f"{tmp_path}/s.parquet")
    assert (len(sidecar), fault.reason) == (0, "bad_sidecar")
    assert "when unpacked" in fault.detail


FAR = 1 << 62


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2], pa.timestamp("us", tz="No/Zone")),
        pa.array([FAR, 1], pa.timestamp("us")),
        pa.array([1 << 30, 1], pa.int32()).cast(pa.date32()),
        pa.array([FAR, 1], pa.duration("s")),
        pa.array([1, 2], pa.time64("ns")),
        pa.array([decimal.Decimal("1.5"), None], pa.decimal256(50, 3)),
        pa.array([[("a", 1), ("a", 2)], None], pa.map_(pa.string(), pa.int64())),
        pa.array([[FAR], [1]], pa.list_(pa.timestamp("us"))),
        pa.array([None, None], pa.null()),
        pa.array([(1 << 64) - 1, 1], pa.uint64()),
    ],
    ids=lambda values: str(values.type),
)
def test_columns_of_odd_types_reject_nothing(tmp_path: Path, values: pa.Array) -> None:
    shard = shard_of(tmp_path, "a", "b")
    write_sidecar(tmp_path, ["a", "b"], odd=values)
    assert outcomes(read(shard)) == ["ok", "ok"]
