"""Seconds in which a driver works alone."""

import pytest

from jobs.runtime.driver_clock import DriverClock


class Now:
    """A time that tests set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch) -> Now:
    found = Now()
    monkeypatch.setattr("time.monotonic", found)
    return found


def test_the_clock_runs_between_tables(now):
    clock = DriverClock()
    for begins, rows, ends in ((1.0, (2.0, 5.0), 7.0), (7.0, (8.0, 20.0), 24.0)):
        now.seconds = begins
        clock.pause()
        for now.seconds in rows:
            clock.run_from_now()
        now.seconds = ends
    assert clock.seconds == (7.0 - 5.0) + (24.0 - 20.0)


def test_a_complete_table_starts_no_clock(now):
    clock = DriverClock()
    clock.pause()
    now.seconds = 9.0
    assert clock.seconds is None


def test_a_reset_clock_has_counted_nothing(now):
    clock = DriverClock()
    clock.run_from_now()
    now.seconds = 3.0
    clock.reset()
    assert clock.seconds is None
