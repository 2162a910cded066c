"""Nothing that jobs write or print shows a row that was forgotten, or refused as unsafe."""

import base64
from pathlib import Path

import pyarrow.parquet as pq
from deletion_run import keys_of
from in_process import in_process
from pydantic import TypeAdapter

from jobs import encode_latents, forget, generate_pairs, report
from jobs.reports.part_cache import PartCache
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.schemas import to_png
from snapfusion.mini.scenes import captioned_image

ROWS = 8
UNSAFE, FORGOTTEN, KEPT, BOTH = 1, 2, 3, 4
"""Rows by their fate; the last is unsafe and forgotten before it is read."""

VALUES = ("latents.selection.max_unsafe=0.5", "pairs.generation.steps=2", "oracle_floor=null")
SETTINGS = [option for value in VALUES for option in ("--set", value)]


def texts_of(row: int) -> set[bytes]:
    """What would disclose a row, but for its id: caption, address, and the image in a file or on a page."""
    image, caption = captioned_image(row)
    return {caption.encode(), url_of(row).encode(), to_png(image), base64.b64encode(to_png(image))}


def url_of(row: int) -> str:
    return f"http://origin.example/secret-{row}.png"


def id_of(row: int) -> str:
    return f"scenes/00000/{row:09d}"


def write_shards(folder: Path) -> None:
    rows = [
        ShardRow(
            image=to_png(captioned_image(row)[0]),
            caption=captioned_image(row)[1],
            url=url_of(row),
            metadata={"punsafe": 0.99 if row in (UNSAFE, BOTH) else 0.01},
        )
        for row in range(ROWS)
    ]
    write_shard(str(folder), rows, index=0, extension="png")


def content_of(path: Path) -> bytes:
    """A file's bytes; of Parquet the values too, which are compressed."""
    data = path.read_bytes()
    return data + repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else data


def disclosing(out: Path, row: int) -> set[str]:
    """The files outside the shards that show a row, `id:` before those that have no more than its id."""
    found = set()
    for path in (path for path in out.rglob("*") if path.is_file() and "shards" not in path.parts):
        data, name = content_of(path), str(path.relative_to(out))
        if any(text in data for text in texts_of(row)):
            found.add(name)
        elif id_of(row).encode() in data:
            found.add(f"id:{name}")
    return found


def test_no_output_shows_forgotten_or_unsafe_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    write_shards(out / "shards")
    for job in (encode_latents, generate_pairs):
        monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)

    def run_all() -> str:
        for job in (encode_latents, generate_pairs, report):
            assert job.main(["--out", str(out), *SETTINGS]) == 0
        assert encode_latents.main(["--out", str(out), *SETTINGS, "--dry-run"]) == 0
        streams = capsys.readouterr()
        return streams.out + streams.err

    DeletionList(str(out / "forgotten")).add(keys_of(ids=[id_of(BOTH)]))
    printed = run_all()
    assert disclosing(out, BOTH) == set()
    # Without a request the row is shown, so that the search below can find it.
    assert {"report/index.html", "report/cache/scenes.json"} <= disclosing(out, FORGOTTEN)
    (tmp_path / "ids.txt").write_text(f"{id_of(FORGOTTEN)}\n")
    assert forget.main(["--out", str(out), "--id", str(tmp_path / "ids.txt"), "--erase"]) == 0
    printed += run_all()

    assert disclosing(out, FORGOTTEN) == disclosing(out, BOTH) == set()
    assert "report/index.html" in disclosing(out, KEPT)
    # A refused row is accounted for by its id, in the table that does not hold it.
    assert all(name.startswith("id:latents") for name in disclosing(out, UNSAFE))
    for row in (UNSAFE, FORGOTTEN, BOTH):
        assert not any(text in printed for text in (captioned_image(row)[1], url_of(row), id_of(row)))


def test_parts_of_the_report_end_with_their_rows(tmp_path):
    cache = PartCache(str(tmp_path / "report" / "cache"))
    form = TypeAdapter(str)
    for name in ("scenes", "decoders"):
        cache.part(name, form, follows_from=0, compute=lambda: "an image")
    later = PartCache(str(tmp_path / "report" / "cache"))
    later.part("scenes", form, follows_from=0, compute=lambda: "an image")
    later.remove_others()
    assert [path.name for path in (tmp_path / "report" / "cache").iterdir()] == ["scenes.json"]
