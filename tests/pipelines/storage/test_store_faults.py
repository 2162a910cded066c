"""Tables in a store that responds with 503, breaks connections, loses responses, stalls and truncates."""

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import fault_proxy
import pytest
import synthetic_units
from faulty_store import faults_in, faulty


def test_faults_lose_and_double_no_row(bucket: str, tmp_path: Path) -> None:
    quiet, loud = f"{bucket}/quiet", f"{bucket}/loud"
    synthetic_units.run(quiet, total=40)
    with faulty(tmp_path / "faults", seed=0, rate=0.3, most=5):
        synthetic_units.run(loud, total=40)
    hit = faults_in(tmp_path / "faults")
    assert hit == {(one, kind): 1 for one in fault_proxy.OPERATIONS for kind in fault_proxy.KINDS}
    assert synthetic_units.equal(loud, quiet)


@pytest.mark.slow
def test_thousand_faults_lose_and_double_no_row(bucket, tmp_path, capsys):
    """Eight tables at a time, since most of the time is waited."""
    quiet, loud = f"{bucket}/of-200-rows", [f"{bucket}/loud-{number}" for number in range(8)]
    began = time.monotonic()
    synthetic_units.run(quiet, total=200)
    peace = time.monotonic() - began
    with (
        faulty(tmp_path / "faults", seed=0, rate=0.3, most=250),
        ProcessPoolExecutor(len(loud), mp_context=get_context("spawn")) as writers,
    ):
        began = time.monotonic()
        list(writers.map(partial(synthetic_units.run, total=200), loud))
        war = time.monotonic() - began
    hit = faults_in(tmp_path / "faults")
    with capsys.disabled():
        print(f"\n{hit.total()} faults while 8 tables of 200 rows were written, in {war:.0f} s")
        for one in fault_proxy.OPERATIONS:
            print(f"  {one:8}", *(f"{hit[one, kind]} {kind}" for kind in fault_proxy.KINDS), sep="  ")
        print(f"one such table in peace: {peace:.0f} s")
    assert all(synthetic_units.equal(table, quiet) for table in loud)
    assert hit == {(one, kind): 50 for one in fault_proxy.OPERATIONS for kind in fault_proxy.KINDS}
