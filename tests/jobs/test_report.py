"""The report of a run: gathered from what is committed, and loud when pictures are not what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from in_process import in_process

from jobs import report
from pipelines.pairs import Pairs, generate_pairs
from pipelines.sources.captions import Caption
from pipelines.stages.generate import Generation
from pipelines.storage import read_bytes, replace_object
from snapfusion.mini.scenes import caption_of, scene_of

CAPTIONS = [Caption(id=f"{n:03d}", ordinal=n, text=caption_of(scene_of(97 * n))) for n in range(8)]


def draw(out: Path, *, guidance: float, captions: list[Caption] = CAPTIONS) -> None:
    generation = Generation(steps=4, guidance=guidance, batch_size=8)
    generate_pairs(
        Pairs(generation=generation),
        teacher="mini",
        captions=captions,
        source="captions",
        url=str(out / "pairs"),
        run=in_process,
    )


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_a_run_that_has_only_pairs_is_reported(tmp_path, capsys):
    draw(tmp_path, guidance=2.0)
    assert report.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert CAPTIONS[0].text in page
    assert "5 of 5 attributes right" in page
    found = metrics(tmp_path)
    assert found["oracle"]["images"] == 8
    assert found["tables"]["pairs"]["rows_read"] == found["tables"]["pairs"]["rows_written"] == 8
    assert found["decoder"] is None


def test_pictures_below_the_floor_fail_after_the_page_is_written(tmp_path, capsys):
    draw(tmp_path, guidance=80.0)
    assert report.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "the oracle finds" in said
    assert "oracle_floor is 95%" in said
    assert metrics(tmp_path)["oracle"]["mean_attributes_right"] < 0.95
    assert (tmp_path / "report" / "index.html").exists()


def test_captions_that_are_no_scenes_are_left_to_people(tmp_path):
    draw(tmp_path, guidance=2.0, captions=[Caption(id="0", ordinal=0, text="<b>a dog</b>")])
    assert report.main(["--out", str(tmp_path)]) == 0
    assert metrics(tmp_path)["oracle"] is None
    assert "<b>a dog</b>" not in (tmp_path / "report" / "index.html").read_text()


def test_a_report_can_lie_in_a_bucket_and_be_written_again(bucket):
    out = f"{bucket}/run"
    for _ in range(2):  # nothing is committed there yet, which is a report too
        assert report.main(["--out", out]) == 0
    assert b"Recipe mini" in read_bytes(f"{out}/report/index.html")
    assert json.loads(read_bytes(f"{out}/metrics.json"))["tables"] == {}


def test_a_page_that_is_there_is_replaced_whole(tmp_path):
    place = tmp_path / "report" / "index.html"
    for text in (b"first", b"second"):
        replace_object(str(place), text)
    assert place.read_bytes() == b"second"
    assert [found.name for found in place.parent.iterdir()] == ["index.html"]
