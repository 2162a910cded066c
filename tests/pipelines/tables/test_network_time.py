"""Share of the time in which networks compute, between the first and last units of their workers."""

import pytest

from pipelines.tables.network_time import NetworkTime, UnitSpan


def time_of(*spans: tuple[str, float, float]) -> NetworkTime:
    time = NetworkTime()
    for span in spans:
        time = time.with_span(UnitSpan(*span))
    return time


def test_only_time_between_first_and_last_units_counts():
    # The workers' clocks have nothing in common; units arrive in another order than they were made.
    time = time_of(("a", 10.0, 14.0), ("b", 907.0, 909.0), ("a", 16.0, 20.0), ("b", 900.0, 905.0))
    assert time.busy_share == (4 + 4 + 5 + 2) / (10 + 9)


def test_one_unit_has_no_time_between():
    assert time_of(("a", 0.0, 4.0)).busy_share is None
    assert time_of(("a", 0.0, 4.0), ("b", 0.0, 1.0), ("b", 3.0, 4.0)).busy_share == 2 / 4


def test_units_of_unknown_time_change_nothing():
    time = time_of(("a", 0.0, 1.0), ("a", 1.0, 2.0))
    assert time.with_span(None) == time
    assert (time + time_of(("b", 0.0, 1.0), ("b", 3.0, 4.0))).busy_share == pytest.approx(4 / 6)
