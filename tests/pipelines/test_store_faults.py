"""Tables in a store that answers 503, breaks connections, loses answers, stalls and sends halves."""

from __future__ import annotations

from pathlib import Path

import fault_proxy
import pytest
import synthetic_units
from faulty_store import faults_in, faulty

from pipelines.tables import accounts, open_table, rejected_rows


def check(bucket: str, log: Path, *, rows: int, rate: float, most: int) -> int:
    """Make a table of so many rows through the proxy, and hold it to one that was made in peace."""
    quiet, loud = f"{bucket}/quiet-{rows}", f"{bucket}/loud-{rows}"
    synthetic_units.run(quiet, total=rows)
    with faulty(log, seed=0, rate=rate, most=most):
        synthetic_units.run(loud, total=rows)
    hit = faults_in(log)
    assert set(hit) == {(one, kind) for one in fault_proxy.OPERATIONS for kind in fault_proxy.KINDS}
    assert open_table(loud).read().equals(open_table(quiet).read())
    assert accounts(loud) == accounts(quiet)
    assert rejected_rows(loud) == rejected_rows(quiet)
    return sum(hit.values())


def test_no_row_is_lost_or_doubled_whatever_the_store_does(bucket: str, tmp_path: Path) -> None:
    assert check(bucket, tmp_path / "faults.jsonl", rows=40, rate=0.3, most=5) == 20


@pytest.mark.slow
def test_nor_after_a_thousand_faults(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = check(bucket, tmp_path / "faults.jsonl", rows=1_600, rate=0.3, most=250)
    with capsys.disabled():
        print(f"\n{faults} faults, 1,600 rows: none lost, none doubled")
    assert faults == 1_000
