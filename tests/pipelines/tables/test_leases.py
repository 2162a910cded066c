"""Leases: one has the turn, who died blocks nobody for long, and who reads is known."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipelines.tables import leases
from pipelines.tables.leases import TableBusy, active_readers, append_lease, read_lease, remove_expired


def test_one_has_the_turn_and_the_next_gets_it_afterwards(tmp_path: Path):
    url = str(tmp_path / "table")
    said = r"the first on .*, process \d+ is appending; its lease expires in \d+ s"
    with (
        append_lease(url, purpose="the first"),
        pytest.raises(TableBusy, match=said),
        append_lease(url, purpose="the second"),
    ):
        pass
    with append_lease(url, purpose="the second"):
        pass
    assert remove_expired(url) == 1
    assert [path.name for path in tmp_path.glob("table.leases/*")] == ["turn-00000002.json"]


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path):
    url, had, refused = str(tmp_path / "table"), [], []
    go, done = threading.Barrier(8), threading.Barrier(8)

    def ask(number: int) -> None:
        go.wait()
        try:
            with append_lease(url, purpose=str(number)):
                had.append(number)
                done.wait()
        except TableBusy:
            refused.append(number)
            done.wait()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(had), len(refused)) == (1, 7)


def test_a_turn_is_renewed_while_it_lasts(tmp_path: Path):
    url = str(tmp_path / "table")
    with append_lease(url, purpose="long", seconds=0.4):
        time.sleep(1.0)
        with pytest.raises(TableBusy), append_lease(url, purpose="other", seconds=0.4):
            pass


def test_who_died_blocks_nobody_for_longer_than_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = str(tmp_path / "table")
    with monkeypatch.context() as patch:
        # As if the process were killed: nothing is renewed, and nothing ended.
        patch.setattr(leases, "replace_object", lambda *_: None)
        with append_lease(url, purpose="dead", seconds=0.3):
            pass
    with pytest.raises(TableBusy, match="dead on"), append_lease(url, purpose="heir"):
        pass
    time.sleep(0.35)
    with append_lease(url, purpose="heir"):
        pass


def test_a_failure_ends_the_turn_with_it(tmp_path: Path):
    url = str(tmp_path / "table")
    with pytest.raises(ZeroDivisionError), append_lease(url, purpose="fails"):
        raise ZeroDivisionError
    with append_lease(url, purpose="next"):
        pass


def test_who_reads_is_known_until_it_ends(tmp_path: Path, bucket: str):
    for url in (str(tmp_path / "table"), f"{bucket}/table"):
        with read_lease(url, version=7, purpose="student"), read_lease(url, version=3, purpose="decoder"):
            assert [(lease.version, lease.holder.split()[0]) for lease in active_readers(url)] == [
                (3, "decoder"),
                (7, "student"),
            ]
            assert remove_expired(url) == 0
        assert active_readers(url) == []
        assert remove_expired(url) == 2
