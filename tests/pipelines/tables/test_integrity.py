"""Readers notice a flipped bit, once for each file and process, unless a setting says otherwise."""

import contextlib
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import synthetic_units
from table_damage import without_page_checksums

from jobs.runtime.credentials import apply_storage
from jobs.runtime.settings import StorageSettings
from pipelines.tables import integrity, manifest
from pipelines.tables.integrity import DamagedFileError, has_page_checksums
from pipelines.tables.settings import CHECK_FILES_VARIABLE
from pipelines.tables.table import Snapshot, open_table


@pytest.fixture(params=["page checksums", "SHA-256"])
def table(request, tmp_path: Path, monkeypatch) -> Snapshot:
    """A table whose files have page checksums, or were written before those."""
    old = request.param == "SHA-256"
    with monkeypatch.context() as patch:
        if old:
            patch.setattr(manifest.pq, "write_table", without_page_checksums)
        synthetic_units.run(str(tmp_path / "latents"))
    made = open_table(str(tmp_path / "latents"))
    assert has_page_checksums(Path(made.units[0].path).read_bytes()) == (not old)
    monkeypatch.setattr(integrity, "_checked", set())
    monkeypatch.setenv(CHECK_FILES_VARIABLE, "1")
    return made


def flip(path: str, position: int, *, bit: int = 0) -> None:
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1 << bit
    Path(path).write_bytes(data)


def latent_byte(path: str) -> int:
    """The position of a byte in the latents of a file."""
    chunk = pq.read_metadata(path).row_group(0).column(4)
    assert chunk.path_in_schema == "latent"
    return chunk.data_page_offset + chunk.total_compressed_size - 1


@pytest.mark.parametrize("columns", [None, ["id", "latent"]])
def test_flipped_bit_of_a_row_is_an_error(table, columns):
    file = table.units[0]
    flip(file.path, latent_byte(file.path))
    with pytest.raises(DamagedFileError, match=r"s-000000-000004\.parquet is damaged"):
        table.read_unit(file, columns)


def test_any_flipped_bit_is_an_error_or_harmless(table):
    file = table.units[0]
    rows, data, draws = table.read_unit(file), Path(file.path).read_bytes(), random.Random(0)
    for _ in range(60):
        integrity._checked.clear()
        flip(file.path, draws.randrange(len(data)), bit=draws.randrange(8))
        with contextlib.suppress(DamagedFileError):
            assert table.read_unit(file, rows.column_names).equals(rows)
        Path(file.path).write_bytes(data)


def test_file_is_checked_once_in_a_process(table):
    file = table.units[0]
    rows = table.read_unit(file)
    flip(file.path, latent_byte(file.path))
    assert not table.read_unit(file).equals(rows)


def test_checks_are_turned_off_by_a_setting(table):
    file = table.units[0]
    flip(file.path, latent_byte(file.path))
    apply_storage(StorageSettings(check_files=False))
    assert table.read_unit(file).num_rows == file.rows
    apply_storage(StorageSettings())
    with pytest.raises(DamagedFileError):
        table.read_unit(file)


def test_ids_alone_do_not_fetch_older_files(table):
    file = table.units[0]
    flip(file.path, latent_byte(file.path))
    assert table.read_unit(file, ["id"])["id"].to_pylist() == ["s/1", "s/2", "s/3"]
