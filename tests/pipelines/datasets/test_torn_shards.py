"""Shards that are torn, and whole later: rows before the tear are committed, and those after it once."""

from pathlib import Path

import pytest
from latent_inputs import SETTINGS, encode, make_shards, verify

from pipelines.datasets.latents import recomputer
from pipelines.datasets.shard_plan import pending_shards
from pipelines.sources.webdataset import list_shards
from pipelines.stages.read import ReadShard
from pipelines.tables.committer import CommitProgress, TooManyRejected, check_bounds
from pipelines.tables.manifest import UnitManifest, covers_source
from pipelines.tables.settings import Bounds
from pipelines.tables.table import TableError


class Reading:
    """Units of a folder's shards as LATENTS would commit them, without its network and its table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests: list[UnitManifest] = []
        self.images: dict[str, bytes] = {}
        self.refused: list[str] = []

    def run(self, *, units: int | None = None) -> int:
        """Read what is pending, at most `units` units; returns their number."""
        names = ("rows_per_unit", "shards", "images", "selection")
        stage = ReadShard(shapes=((16, 16),), **{name: getattr(SETTINGS, name) for name in names})
        pending = pending_shards(
            list_shards(str(self.folder)),
            self.manifests,
            source="web",
            max_refused=0.5,
            on_refused=self.refused.append,
        )
        outputs = [output for work in pending for output in stage(work)][:units]
        for rows in outputs:
            manifest = rows.unit.manifest(
                settings="",
                environment={},
                rows_read=rows.unit.rows_read,
                rows_written=len(rows.ids),
                rejections=rows.rejections,
            )
            assert UnitManifest.from_json(manifest.to_json()) == manifest
            self.manifests.append(manifest)
            assert self.images.keys().isdisjoint(rows.ids)
            self.images |= {id_: image.tobytes() for id_, image in zip(rows.ids, rows.images, strict=True)}
        return len(outputs)

    def reasons(self) -> list[str]:
        return [rejection.reason for unit in self.manifests for rejection in unit.rejections]


def read_whole(folder: Path) -> Reading:
    reading = Reading(folder)
    reading.run()
    return reading


@pytest.fixture(params=["sidecar", "stats", "neither"])
def shards(request, tmp_path) -> Path:
    """Two shards, whose rows are counted by one file or none."""
    folder = make_shards(tmp_path / "shards")
    endings = {"sidecar": (), "stats": (".parquet",), "neither": (".parquet", "_stats.json")}[request.param]
    for path in [path for path in folder.iterdir() if path.name.endswith(endings or ".none")]:
        path.unlink()
    return folder


@pytest.mark.parametrize("fractions", [(0.0,), (0.5,), (0.3, 0.6), (0.95,)])
def test_a_torn_shard_is_read_on(shards, fractions):
    tar, whole = shards / "00001.tar", read_whole(shards)
    data, reading = tar.read_bytes(), Reading(shards)
    for fraction in fractions:
        tar.write_bytes(data[: int(len(data) * fraction)])
        assert reading.run()
        assert reading.images.items() <= whole.images.items()
        assert reading.run() == 0
    tar.write_bytes(data)
    assert reading.run()
    assert reading.images == whole.images
    units = [unit for unit in reading.manifests if unit.source == "web/00001"]
    assert {unit.parent for unit in units if unit.parent} == {unit.unit for unit in units if unit.tear}
    assert covers_source(units)
    assert reading.run() == 0


def test_a_shard_torn_in_its_end_is_read_on(shards):
    tar = shards / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.rstrip(b"\0"))
    reading = read_whole(shards)
    tar.write_bytes(data)
    reading.run()
    assert reading.run() == 0
    assert len(reading.images) == 18


@pytest.mark.parametrize("units", [1, 2])
def test_a_killed_child_is_completed(shards, units):
    whole, tar = read_whole(shards), shards / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 3])
    reading = read_whole(shards)
    tar.write_bytes(data)
    assert reading.run(units=units) == units
    reading.run()
    assert (reading.images, reading.run()) == (whole.images, 0)


def test_failed_rows_are_rejected_once(tmp_path):
    folder = make_shards(tmp_path / "shards", shards=1)
    path = folder / "00000_stats.json"
    path.write_text('{"count": 13, "failed_to_download": 2, "failed_to_resize": 1}')
    (folder / "00000.parquet").unlink()
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(data[: len(data) // 2])
    reading = read_whole(folder)
    assert len(reading.images) + len(reading.reasons()) == 13
    (folder / "00000.tar").write_bytes(data)
    reading.run()
    reasons = reading.reasons()
    assert [reasons.count(name) for name in ("download_failed", "resize_failed", "not_an_image")] == [2, 1, 1]
    assert len(reading.images) == 9


def test_another_shard_after_a_tear_is_refused_alone(tmp_path):
    folder = make_shards(tmp_path / "shards", shards=3)
    tar, whole = folder / "00001.tar", read_whole(folder)
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    (folder / "00002.tar").rename(tmp_path / "later")
    reading = read_whole(folder)
    tar.write_bytes(b"x" + data[1:])
    (tmp_path / "later").rename(folder / "00002.tar")
    reading.run()
    [row] = [row for unit in reading.manifests for row in unit.rejections if row.reason == "changed_shard"]
    assert (row.id, row.source) == ("web/00001/.tar", "web/00001")
    assert sum(id_.startswith("web/00002") for id_ in reading.images) == 9
    # The right one is read on even then.
    tar.write_bytes(data + bytes(512))
    reading.run()
    assert reading.images == whole.images


def test_a_whole_shard_that_changed_is_refused_by_name(tmp_path):
    folder = make_shards(tmp_path / "shards", shards=3)
    (folder / "00002.tar").rename(tmp_path / "later")
    reading = read_whole(folder)
    (tmp_path / "later").rename(folder / "00002.tar")
    (folder / "00001.tar").write_bytes(b"another")
    reading.run()
    [line] = reading.refused
    assert str(folder / "00001.tar") in line
    assert len(reading.images) == 27
    (folder / "00000.tar").write_bytes(b"another")
    with pytest.raises(TableError, match=r"00000\.tar is not the shard .* 1 other shards have changed too"):
        reading.run()


def test_a_pointer_is_replaced_by_its_shard(tmp_path):
    folder = make_shards(tmp_path / "shards", shards=1)
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "00000.parquet").unlink()
    reading = read_whole(folder)
    assert set(reading.reasons()) == {"not_a_shard"}
    (folder / "00000.tar").write_bytes(data)
    reading.run()
    assert len(reading.images) == 9


def test_a_table_takes_a_shard_that_is_whole_later(tiny_teacher, tmp_path):
    folder = make_shards(tmp_path / "shards", shards=1)
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(data[: len(data) // 2])
    torn = encode(tmp_path / "latents", folder, tiny_teacher)
    assert torn.num_rows + len(list(torn.rejected_rows())) == 10
    (folder / "00000.tar").write_bytes(data)
    table = encode(tmp_path / "latents", folder, tiny_teacher)
    ids = table.read()["id"].to_pylist()
    assert (len(ids), len(set(ids))) == (9, 9)
    recompute = recomputer(table, model=tiny_teacher, shards=list_shards(str(folder)), source="web")
    assert verify(table, recompute).faults == ()


def test_rejected_shards_are_bounded(tmp_path):
    folder = make_shards(tmp_path / "shards", shards=6, rows=4, bad=())
    for tar in sorted(folder.glob("*.tar"))[:4]:
        tar.write_bytes(tar.read_bytes()[:-9_000])
        tar.with_suffix(".parquet").unlink()
        tar.with_name(f"{tar.stem}_stats.json").unlink()
    manifests = read_whole(folder).manifests
    assert [unit.tear is not None for unit in manifests] == [True] * 4 + [False] * 2
    bounds = Bounds(max_rejected_shards=0.5, shards_judged_after=3)
    with pytest.raises(TooManyRejected, match=r"3 of 3 shards were rejected.*raise max_rejected_shards"):
        judged(manifests, bounds)
    judged(manifests, bounds.model_copy(update={"max_rejected_shards": 1.0}))
    judged(manifests, bounds.model_copy(update={"shards_judged_after": 7}))


def judged(manifests: list[UnitManifest], bounds: Bounds) -> None:
    """Pass the units through the committer's bounds."""
    progress = CommitProgress()
    for manifest in manifests:
        progress = progress.with_shards(manifest)
        check_bounds(progress, bounds, url="latents")


def test_manifests_of_whole_shards_keep_their_form():
    values = {"source": "s", "start": 0, "stop": 0, "final": True, "source_digest": "d", "unit": "u"}
    manifest = UnitManifest(**values, settings="", environment={}, rows_read=0, rows_written=0)
    assert set(manifest.to_json().split('"')).isdisjoint({"tear", "parent"})
