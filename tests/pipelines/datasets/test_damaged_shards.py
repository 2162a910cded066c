"""Row accounting on shards that are flipped, cut and spliced at random: 1,000 of them in `make bench`."""

import random
import resource
from pathlib import Path

import pytest
from latent_inputs import make_shards
from test_torn_shards import Reading

from pipelines.tables.manifest import covers_source, total_rejected

ROWS = 12
BLOCK = 512


def flip(data: bytes, draw: random.Random) -> bytes:
    """Change up to 8 bytes, half of the time in one block."""
    changed, within = bytearray(data), draw.choice((BLOCK, len(data)))
    begin = draw.randrange(max(len(data) - within, 0) + 1)
    for _ in range(draw.randint(1, 8)):
        changed[begin + draw.randrange(within)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Leave a beginning, a third of the time filled up with zeros."""
    left = data[: draw.randrange(len(data))]
    return left.ljust(len(data), b"\0") if draw.random() < 1 / 3 else left


def splice(data: bytes, draw: random.Random) -> bytes:
    """Replace a range by zeros, by another range, or by nothing; or put the file behind itself."""
    step = draw.choice((1, BLOCK))
    begin, end = sorted(draw.randrange(len(data)) // step * step for _ in range(2))
    other = draw.randrange(len(data)) // step * step
    middle = draw.choice((bytes(end - begin), data[other : other + end - begin], b"", data))
    return data[:begin] + middle + data[end:]


def damage(folder: Path, seed: int, *, count: int) -> set[str]:
    """Damage every tar, and remove or damage half of the sidecars; returns the names of the others."""
    intact = set()
    for number, tar in enumerate(sorted(folder.glob("*.tar"))[:count]):
        draw = random.Random(f"{seed}/{number}")
        kinds = (flip, cut, splice)
        tar.write_bytes(draw.choice(kinds)(tar.read_bytes(), draw))
        sidecar, fate = tar.with_suffix(".parquet"), draw.random()
        if fate < 0.25:
            sidecar.unlink()
        elif fate < 0.5:
            sidecar.write_bytes(draw.choice(kinds)(sidecar.read_bytes(), draw))
        else:
            intact.add(tar.stem)
        if draw.random() < 0.5:
            tar.with_name(f"{tar.stem}_stats.json").unlink()
    return intact


def assert_accounted_for(reading: Reading, *, shards: int, intact: set[str]) -> None:
    by_source: dict[str, list] = {}
    for unit in reading.manifests:
        by_source.setdefault(unit.source, []).append(unit)
    assert len(by_source) == shards
    rejected = {row.id for unit in reading.manifests for row in unit.rejections}
    for source, units in by_source.items():
        assert covers_source(units)
        assert sum(unit.rows_read for unit in units) == units[-1].stop
        name = source.partition("/")[2]
        has_count = name in intact or (reading.folder / f"{name}_stats.json").exists()
        assert units[-1].stop >= (ROWS if has_count else 1)
        if name in intact:
            assert {f"{source}/{name}{row:02d}" for row in range(ROWS)} <= rejected | reading.images.keys()


def read_damaged(folder: Path, *, seed: int, shards: int) -> Reading:
    make_shards(folder, shards=shards, rows=ROWS, bad=())
    intact = damage(folder, seed, count=shards)
    reading = Reading(folder)
    reading.run()
    assert_accounted_for(reading, shards=shards, intact=intact)
    return reading


def test_every_row_of_damaged_shards_is_accounted_for(tmp_path):
    read_damaged(tmp_path, seed=0, shards=30)


@pytest.mark.slow
def test_a_thousand_damaged_shards_stop_no_reader(tmp_path, capsys):
    before = peak_mib()
    reading = read_damaged(tmp_path, seed=1, shards=1_000)
    read = sum(unit.rows_read for unit in reading.manifests)
    rejected = total_rejected(reading.manifests)
    assert read == len(reading.images) + sum(rejected.values())
    with capsys.disabled():
        print(f"\n{read} rows read = {len(reading.images)} written + {rejected}")
        print(f"peak {peak_mib():.0f} MiB, of which {before:.0f} MiB before the first shard")


def peak_mib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
