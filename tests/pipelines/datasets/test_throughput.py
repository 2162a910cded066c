"""generate_pairs under Ray against the bare teacher loop, in one run; part of `make bench`."""

import os
import statistics
import time
from pathlib import Path

import pytest

from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.ray_data.execution import run_on_ray
from pipelines.sources.captions import Caption
from pipelines.stages.generate import GeneratePairs
from pipelines.stages.settings import Generation
from pipelines.tables.units import CaptionRows, Unit
from snapfusion.mini.scenes import caption_of, scene_of

UNITS, ROWS = 12, 32
# One actor of one thread, as is the default.
GENERATION = Generation(steps=50, guidance=2.5, batch_size=ROWS)
SETTINGS = PairsSettings(generation=GENERATION, rows_per_unit=ROWS)
CAPTIONS = [Caption(id=f"{n:09d}", ordinal=n, text=caption_of(scene_of(n))) for n in range(UNITS * ROWS)]


def bare_rate(units: int) -> float:
    """Rows a second of the teacher alone, one thread, the first unit not counted."""
    teacher = GeneratePairs(model="mini", settings=SETTINGS.generation, device=SETTINGS.device)
    unit = Unit(name="u", source="s", start=0, stop=ROWS, final=True, source_digest="")
    rows = CaptionRows(unit=unit, draw=0, captions=CAPTIONS[:ROWS], rejections=[])
    teacher(rows)
    began = time.monotonic()
    for _ in range(units):
        teacher(rows)
    return units * ROWS / (time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.ray
def test_generation_is_nearly_as_fast_as_the_teacher(ray_cluster, tmp_path: Path, capsys):
    reports = []
    before = bare_rate(3)
    inputs = {"teacher": "mini", "captions": CAPTIONS, "source": "captions"}
    run = {"run": run_on_ray, "on_progress": reports.append}
    generate_pairs(SETTINGS, url=str(tmp_path / "pairs"), **inputs, **run)
    bare = statistics.mean([before, bare_rate(3)])  # before and after, since the machine drifts
    rate = reports[-1].rate
    with capsys.disabled():
        print(f"\n{os.cpu_count()} cores: {rate:.2f} rows/s, bare {bare:.2f}, ratio {rate / bare:.3f}")
    assert rate / bare >= 0.9
