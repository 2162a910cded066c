"""Tables in a store that answers 503, breaks connections, loses answers, stalls and sends halves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fault_proxy
import pytest
import s3fs
import synthetic_units

from pipelines.tables import accounts, open_table, rejected_rows

PROXY = Path(fault_proxy.__file__)


@contextmanager
def faulty(log: Path, *, seed: int, rate: float, most: int) -> Iterator[None]:
    """All that is asked of the store goes through the proxy; a process of its own, as the server is."""
    there = os.environ["AWS_ENDPOINT_URL"]
    command = [
        sys.executable,
        str(PROXY),
        there.rpartition(":")[2],
        str(log),
        str(seed),
        str(rate),
        str(most),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            port = int(proxy.stdout.readline())
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
                s3fs.S3FileSystem.clear_instance_cache()
                yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            proxy.kill()


def faults_in(log: Path) -> Counter[tuple[str, str]]:
    return Counter(tuple(json.loads(line)) for line in log.read_text().splitlines())


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
