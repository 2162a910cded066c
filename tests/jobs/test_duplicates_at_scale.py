"""A round of verdicts on many rows: what it finds, how long it takes, what it holds; part of `make bench`."""

import os
from pathlib import Path

import numpy as np
import pytest
from memory_meter import MemoryMeter

from jobs.cli.job import Job
from jobs.cli.resources import reader
from jobs.recipes.registry import recipe_named
from pipelines.datasets.settings import LatentsSettings
from pipelines.dedup.duplicates import count_verdicts, find_duplicates
from pipelines.dedup.fingerprints import identity_of
from pipelines.dedup.settings import Deduplication, FingerprintsSettings
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import commit_units
from pipelines.tables.schemas import FINGERPRINTS
from pipelines.tables.table import Snapshot, create_table, open_table
from pipelines.tables.units import FinishedRows, Unit
from snapfusion.settings import digest

ROWS_PER_UNIT = 10_000
EVERY = 50
"""Of so many rows one copies an earlier address, one earlier bytes, one the looks of an earlier picture."""


def rows_of(unit: int) -> FinishedRows:
    """Random keys, and copies of such keys of the unit before as are copies of none."""
    draw, before = (np.random.Generator(np.random.Philox(max(n, 0))) for n in (unit, unit - 1))
    own, other = (
        some.integers(-(2**63), 2**63, (4, ROWS_PER_UNIT), dtype=np.int64) for some in (draw, before)
    )
    if unit:
        for kind in range(3):
            own[kind, kind::EVERY] = other[kind, 10 + kind :: EVERY]
        flipped = np.uint64(1) << draw.integers(0, 64, (4, ROWS_PER_UNIT), dtype=np.uint64)
        own[2, 2::EVERY] ^= np.bitwise_xor.reduce(flipped, axis=0)[2::EVERY].view(np.int64)
    url, image, phash, caption = own
    source = f"web-{unit:05d}"
    ids = [f"{source}/{n:09d}" for n in range(ROWS_PER_UNIT)]
    return FinishedRows(
        unit=Unit(name=source, source=source, start=0, stop=ROWS_PER_UNIT, final=True, source_digest=""),
        columns={
            "id": ids,
            "source_id": [f"https://some.host.org/pictures/{id_}.jpg" for id_ in ids],
            "url_key": url,
            "caption_key": caption,
            "image_sha256": [value.tobytes().hex() * 4 for value in image],
            "phash": phash,
        },
        rejections=[],
    )


def fingerprints(url: str, *, units: int) -> Snapshot:
    table = create_table(
        url, schema=FINGERPRINTS, identity=identity_of(FingerprintsSettings(), latents=LatentsSettings())
    )
    writer = WriteUnit(url=table.url, schema=FINGERPRINTS, settings=digest(table.identity))
    commit_units(url, [writer(rows_of(unit)) for unit in range(units)])
    return open_table(url)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("rows", [int(os.environ.get("ROWS", "200000"))])
def test_planted_duplicates_are_found_in_bounded_memory(rows, tmp_path: Path, capsys):
    units = rows // ROWS_PER_UNIT
    table = fingerprints(str(tmp_path / "fingerprints"), units=units)
    recipe = recipe_named("mini").with_values(["cluster.cpus=2"])
    job = Job(verb="find_duplicates", recipe=recipe, out=str(tmp_path))
    with MemoryMeter() as meter:
        judged = find_duplicates(
            Deduplication(),
            fingerprints=table,
            url=str(tmp_path / "duplicates"),
            read=reader(job, "deduplication"),
        )
    each = (units - 1) * ROWS_PER_UNIT // EVERY
    with capsys.disabled():
        print(
            f"\n{judged.num_rows} rows, {os.cpu_count()} cores: {meter.seconds:.0f} s with the start of Ray, "
            f"peak {meter.peak_gib:.1f} GiB of all processes: {count_verdicts(judged)}"
        )
    kinds = ("duplicate_url", "duplicate_image", "near_duplicate_image")
    assert count_verdicts(judged) == dict.fromkeys(kinds, each)
    assert meter.peak_gib < 8
