"""Leases: one process appends, a dead one blocks nobody for long, and readers are known."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.tables import leases
from pipelines.tables.leases import (
    TableBusy,
    active_readers,
    append_lease,
    exclusive_lease,
    read_lease,
    remove_expired,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "table")


def test_append_lease_passes_to_the_next(url):
    first = r"the first on .*, process \d+ is appending; its lease expires in \d+ s"
    with (
        append_lease(url, purpose="the first"),
        pytest.raises(TableBusy, match=first),
        append_lease(url, purpose="the second"),
    ):
        pass
    with append_lease(url, purpose="the second"):
        pass
    assert remove_expired(url) == 1
    assert [path.name for path in Path(f"{url}.leases").iterdir()] == ["turn-00000002.json"]


def test_one_of_many_gets_the_lease(url):
    begin, end = threading.Barrier(8), threading.Barrier(8)

    def acquires(number: int) -> bool:
        begin.wait()
        try:
            with append_lease(url, purpose=str(number)):
                end.wait()
        except TableBusy:
            end.wait()
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(acquires, range(8))) == 1


def test_held_lease_is_renewed(url):
    with append_lease(url, purpose="long", seconds=0.4):
        time.sleep(1.0)
        with pytest.raises(TableBusy), append_lease(url, purpose="other", seconds=0.4):
            pass


def test_lease_of_a_dead_process_expires(url, monkeypatch):
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


def test_failure_ends_the_lease(url):
    with pytest.raises(ZeroDivisionError), append_lease(url, purpose="fails"):
        raise ZeroDivisionError
    with append_lease(url, purpose="next"):
        pass


def test_readers_are_known_until_they_end(url, bucket):
    for table in (url, f"{bucket}/table"):
        with read_lease(table, version=7, purpose="student"), read_lease(table, version=3, purpose="decoder"):
            readers = [(lease.version, lease.holder.split()[0]) for lease in active_readers(table)]
            assert readers == [(3, "decoder"), (7, "student")]
            assert remove_expired(table) == 0
        assert active_readers(table) == []
        assert remove_expired(table) == 2


@pytest.fixture(params=["disk", "store"])
def folder(request, url) -> str:
    return f"{url}/leases" if request.param == "disk" else f"{request.getfixturevalue('bucket')}{url}/leases"


def test_exclusive_lease_is_held_by_one(folder):
    with (
        exclusive_lease(folder, purpose="the first", seconds=1.0),
        pytest.raises(TableBusy, match=r"leases: the first on .*, process \d+ is at work"),
        exclusive_lease(folder, purpose="the second", seconds=1.0),
    ):
        pass
    began = time.monotonic()
    with exclusive_lease(folder, purpose="the second", seconds=100.0):
        assert time.monotonic() - began < 5.0


def test_killed_holder_is_followed_without_its_renewals(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(leases, "replace_object", lambda *_: None)
        # Its lease would last for an hour.
        with exclusive_lease(folder, purpose="dead", seconds=3600.0):
            pass
    began = time.monotonic()
    with exclusive_lease(folder, purpose="heir", seconds=0.5):
        assert 0.5 <= time.monotonic() - began < 5.0


def test_holder_with_a_slow_clock_is_respected(url, monkeypatch):
    with monkeypatch.context() as patch:
        # It is renewed as if its clock were a minute slow: by ours, it has expired each time.
        replace = leases.replace
        patch.setattr(leases, "replace", lambda lease, until: replace(lease, until=until - 60.0))
        with (
            exclusive_lease(url, purpose="slow", seconds=0.4),
            pytest.raises(TableBusy, match="slow on"),
            exclusive_lease(url, purpose="other", seconds=0.4),
        ):
            pass
