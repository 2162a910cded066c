"""Time and memory until the first unit of a long caption list is planned; part of `make bench`."""

import subprocess
import sys

import pytest

SIZES = [10**4, 10**5, 10**6, 10**7]
"""Captions, with ids."""
FIRST_SECONDS, PEAK_MIB = 60.0, 1024

# One process, which imports once; the peak is that since the list before.
PLAN = """
import itertools, sys, time
from pathlib import Path
from pipelines.datasets.pairs import lazy_units
from pipelines.datasets.settings import PairsSettings
from pipelines.sources.captions import list_captions
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.settings import Generation

def mebibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))

def write(path, rows):
    with path.open("w") as file:
        file.write("id\\tcaption\\n")
        for number in range(rows):
            file.write(f"image-{number:09d}\\ta photograph of the thing number {number} on a table\\n")

settings = PairsSettings(generation=Generation(steps=2, guidance=2.0), rows_per_unit=16)
for rows in map(int, sys.argv[2:]):
    path = Path(sys.argv[1]) / f"{rows}.tsv"
    write(path, rows)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = mebibytes("VmRSS"), time.process_time()
    captions = list_captions(str(path), CaptionSettings(id_column="id"))
    counted = time.process_time()
    units = lazy_units(settings, [], captions=captions, source="list")
    plan = units.plan()
    assert (units.rows, next(plan).unit.rows_read) == (rows, 16)
    first = time.process_time()
    # So many units more, to see what planning keeps in memory.
    further = sum(1 for _ in itertools.islice(plan, 5000))
    took = (time.process_time() - first) / further
    print(rows, counted - began, first - counted, took, mebibytes("VmHWM") - before, flush=True)
    path.unlink()
"""


@pytest.mark.slow
def test_first_unit_of_a_long_list(tmp_path, capsys):
    command = [sys.executable, "-c", PLAN, str(tmp_path), *map(str, SIZES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as planning:
        for line in planning.stdout:
            rows, count, first, unit, peak = map(float, line.split())
            with capsys.disabled():
                print(
                    f"\n{rows:.0f} captions, CPU time: counted in {count:.2f} s, the first unit planned "
                    f"{first * 1e3:.1f} ms later, {unit * 1e3:.2f} ms a further one; peak {peak:.0f} MiB"
                )
            assert first <= FIRST_SECONDS
            assert peak <= PEAK_MIB
    assert planning.returncode == 0
