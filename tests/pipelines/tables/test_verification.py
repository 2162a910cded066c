"""Verification sees what log, folder or siblings lack, and repair restores what the data files show."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_units
from delta_opens import record_opens
from synthetic_units import without_first_row
from table_damage import edit_log, edit_rows, last_entry

from jobs import verify_table as verb
from pipelines.tables.commits import commit_units, replace_units, write_unit
from pipelines.tables.committer import recover
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.repair import repair_table
from pipelines.tables.table import Snapshot, TableError, open_table
from pipelines.tables.verification import CannotRecompute, VerificationReport, verify_table

LAST = "s-000020-000022"
"""The unit that is committed last."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table without faults, read only."""
    url = tmp_path_factory.mktemp("sound") / "latents"
    synthetic_units.run(str(url))
    return url


@pytest.fixture
def url(sound: Path, tmp_path: Path) -> str:
    for ending in ("", ".rejects", ".units"):
        shutil.copytree(f"{sound}{ending}", tmp_path / f"latents{ending}")
    return str(tmp_path / "latents")


def cannot_recompute(*_: object) -> None:
    raise CannotRecompute("it is synthetic")


def verify(table: Snapshot) -> VerificationReport:
    return verify_table(table, recompute=cannot_recompute, units=0, seed=0)


def drop_last_entry(sibling: str) -> Callable[[str], None]:
    return lambda url: last_entry(f"{url}{sibling}").unlink()


def drop_added_file(url: str) -> None:
    edit_log(url, lambda action: None if "add" in action else action)


def drop_added_file_and_record(url: str) -> None:
    drop_added_file(url)
    last_entry(f"{url}.units").unlink()


def edit_count(column: str) -> Callable[[str], None]:
    return lambda url: edit_rows(f"{url}.units", lambda row: row | {column: row[column] + 1})


def edit_reason(url: str) -> None:
    edit_rows(f"{url}.rejects", lambda row: row | {"reason": "too_small"})


LOST = f"unit {LAST} was committed, and the log has lost it"
REPAIRABLE = {
    "last entry of the log": (drop_last_entry(""), LOST),
    "add line": (drop_added_file, LOST),
    "add line and record": (
        drop_added_file_and_record,
        LOST,
    ),
    "last entry of .units": (drop_last_entry(".units"), f"unit {LAST} has no row in the units table"),
    "last entry of .rejects": (drop_last_entry(".rejects"), f"unit {LAST}: its rejected rows differ"),
    "rows read": (edit_count("rows_read"), f"unit {LAST}: rows_read is 3 in the units table and 2"),
    "rows written": (edit_count("rows_written"), f"unit {LAST}: rows_written is 2 in the units table and 1"),
    "rows rejected": (edit_count("rows_rejected"), f"unit {LAST}: rows_rejected is 2 in the units table"),
    "bytes": (edit_count("bytes"), f"unit {LAST}: bytes is"),
    "reason": (edit_reason, f"unit {LAST}: its rejected rows differ"),
}


def test_sound_table_has_no_fault(url):
    found = verify(open_table(url))
    assert (found.units, found.rows, found.rejected, found.faults) == (6, 17, 5, ())
    assert repair_table(open_table(url)).committed == repair_table(open_table(url)).rewritten == ()


@pytest.mark.parametrize("name", REPAIRABLE)
def test_damaged_record_is_found_and_repaired(url, sound, name):
    damage, fault = REPAIRABLE[name]
    damage(url)
    found = verify(open_table(url))
    assert any(line.startswith(fault) for line in found.faults), found.faults
    assert found.repairable == len(found.faults)
    repair_table(open_table(url))
    assert verify(open_table(url)).faults == ()
    assert synthetic_units.equal(url, str(sound))


def test_command_names_and_repairs_faults(url, capsys):
    drop_added_file(url)
    assert verb.main([url, "--set", "verification.units=0"]) == 1
    assert "1 faults" in (printed := capsys.readouterr().err)
    assert "--repair mends 1 of them" in printed
    assert verb.main([url, "--repair", "--set", "verification.units=0"]) == 0


def test_next_job_adopts_what_the_log_lost(url, sound):
    drop_last_entry("")(url)
    assert recover(open_table(url)).num_rows == open_table(str(sound)).num_rows
    assert verify(open_table(url)).faults == ()


def test_lost_data_file_is_found_and_left(url):
    drop_last_entry("")(url)
    Path(url, f"{LAST}.parquet").unlink()
    found = verify(open_table(url))
    assert [line.split(":")[0] for line in found.faults] == [f"{LOST} and the folder its data file"]
    assert found.repairable == 0
    assert repair_table(open_table(url)).committed == ()


def test_altered_data_file_is_never_committed_again(url):
    drop_last_entry("")(url)
    first, last = (Path(url, f"{unit}.parquet") for unit in ("s-000000-000004", LAST))
    last.write_bytes(first.read_bytes())
    assert repair_table(open_table(url)).committed == ()


@pytest.mark.parametrize("path", ["../other/x.parquet", "..%2Fother%2Fx.parquet", "/other/x.parquet"])
@pytest.mark.parametrize("sibling", ["", ".units", ".rejects"])
def test_path_outside_the_table_is_refused(url, path, sibling):
    def climb(action: dict) -> dict:
        return {"add": action["add"] | {"path": path}} if "add" in action else action

    edit_log(f"{url}{sibling}", climb)
    with pytest.raises(TableError, match="is no file of its folder"):
        verify(open_table(url))


def test_undone_deletion_is_named_and_left(url):
    old, new = without_first_row(open_table(url).units[0])
    replace_units(url, [(old, new)])
    drop_last_entry("")(url)
    found = verify(open_table(url))
    assert any("run jobs.forget again" in line for line in found.faults)
    assert found.repairable == 0
    assert repair_table(open_table(url)).rewritten == ()


def test_unit_committed_meanwhile_is_no_fault(url):
    before = open_table(url)
    manifest = UnitManifest(
        unit="s-000022-000022",
        source="s",
        start=22,
        stop=22,
        final=True,
        source_digest="d",
        settings="",
        environment={},
        rows_read=0,
        rows_written=0,
    )
    written = write_unit(
        synthetic_units.SCHEMA.empty_table(), manifest, path=f"{url}/{manifest.unit}.parquet"
    )
    assert verify(before).notes == ("1 data files are in no commit; the next job on the table commits them",)
    commit_units(url, [written])
    assert verify(before).faults == ()


def test_damaged_records_name_their_remedy(url, sound):
    for path in Path(f"{url}.units").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TableError, match=r"remove .*latents\.units and \.rejects"):
        verify(open_table(url))
    for sibling in (".units", ".rejects"):
        shutil.rmtree(f"{url}{sibling}")
    synthetic_units.run(url)
    assert synthetic_units.equal(url, str(sound))


def test_verification_opens_the_log_once(url, monkeypatch):
    table = open_table(url)
    opened = record_opens(monkeypatch)
    verify(table)
    assert opened == [f"{url}.units", f"{url}.rejects"]
