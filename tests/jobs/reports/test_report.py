"""The report of a run: gathered from what is committed, and loud when pictures are not what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import in_process

from jobs import measure_latency as latency_job
from jobs import report
from jobs.evaluation.latency import measure_latency
from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import architectures_of
from jobs.reports import side_by_side
from jobs.training.initial_weights import own_architecture, with_architecture
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Generation
from pipelines.storage.objects import read_bytes, replace_object
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of

CAPTIONS = [Caption(id=f"{n:03d}", ordinal=n, text=caption_of(scene_of(97 * n))) for n in range(8)]


def draw(out: Path, *, guidance: float, captions: list[Caption] = CAPTIONS) -> None:
    generation = Generation(steps=4, guidance=guidance, batch_size=8)
    generate_pairs(
        PairsSettings(generation=generation),
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


def distil(out: Path, *, first: str = "mini-v") -> None:
    """A folder as `jobs.distill_steps` leaves it, of a student that has learnt nothing."""
    teacher, distillation = load("mini-v"), {"steps": 4, "teacher_steps": 8}
    bundle = load(first)
    source = {"source": "mini-v", "weights": teacher.fingerprint()}
    begun = {"source": first, "weights": bundle.fingerprint()}
    save(bundle, out / "student" / "model", distillation=distillation)
    curve = [
        {"step": 1, "vanilla/loss": 0.5},
        {"step": 2, "vanilla/loss": 0.4, "guided/loss": 2.0},
        {"step": 3, "guided/loss": 1.0},
    ]
    metrics = {
        "distillation": distillation,
        "parents": {"teacher": source, "student": begun},
        "settings": {"targets": "online"},
        "settings_hash": "5" * 64,
        "curve": curve,
    }
    (out / "student" / "metrics.json").write_text(json.dumps(metrics))


def test_a_student_is_shown_beside_its_teacher_and_what_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "NUM_CAPTIONS", 6)
    distil(tmp_path)
    assert report.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    for words in ("50 steps · 5/5", "Undistilled", "4 steps · ", "6 held-out captions"):
        assert words in page
    for words in ("Student: distillation loss", "vanilla", "guided", "TEACHER OF STEPS", "STUDENT"):
        assert words in page
    for words in ("of the student, taught by 8", "CLIP over that of its first weights"):
        assert words in page
    found = metrics(tmp_path)
    assert found["student"]["distillation"]["steps"] == 4
    assert "curve" not in found["student"]
    drawn = found["fewer_steps"]
    assert (drawn["guidance"], drawn["captions"]) == (6.0, 6)
    ways = drawn["ways"]
    assert {name: way["steps"] for name, way in ways.items()} == {
        "teacher": 50,
        "undistilled": 4,
        "student": 4,
    }
    assert ways["teacher"]["distance"] == 0.0 < ways["undistilled"]["distance"]
    assert ways["teacher"]["attributes_right"] > 0.9
    # Saved in float16, the student differs from what it was by rounding alone.
    assert ways["student"]["distance"] == pytest.approx(ways["undistilled"]["distance"], rel=0.05)
    gain = drawn["clip_gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert gain["value"] == pytest.approx(0.0, abs=0.01)


def test_an_efficient_student_is_shown_with_its_parents_and_its_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "NUM_CAPTIONS", 4)
    shape = efficient_architecture(own_architecture("mini-v"))
    with_architecture("mini-v", shape, url=str(tmp_path / "efficient-first"))
    # As `jobs.train_efficient` leaves it, of a model that has learnt nothing.
    with_architecture("mini-v", shape, url=str(tmp_path / "efficient"))
    (tmp_path / "efficient" / "metrics.json").write_text("{}")
    assert latency_job.main(["--out", str(tmp_path), "--set", "latency.turns=3"]) == 0
    distil(tmp_path, first=str(tmp_path / "efficient"))
    assert report.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    for words in ("EFFICIENT", "TEACHER OF STEPS", "UNet time of a picture", "Down-1"):
        assert words in page
    assert "FIRST WEIGHTS" not in page
    unets = {unet["name"]: unet for unet in metrics(tmp_path)["latency"][0]["unets"]}
    ratio = 50 * unets["origin"]["measured_ms"] / (4 * unets["table-3"]["measured_ms"])
    assert f"{ratio:,.4g} x" in page


def test_a_student_whose_pictures_no_judge_reads_is_not_drawn(tmp_path):
    distil(tmp_path)
    assert report.main(["--out", str(tmp_path), "--set", "oracle_floor=null"]) == 0
    assert metrics(tmp_path)["fewer_steps"] is None
    assert "No student was drawn." in (tmp_path / "report" / "index.html").read_text()


def test_timed_blocks_are_shown_where_there_are_any(tmp_path):
    assert report.main(["--out", str(tmp_path)]) == 0
    assert "blocks take" not in (tmp_path / "report" / "index.html").read_text()
    settings, origin = LatencySettings(turns=2), architecture_of(load("mini-v").unet)
    told = measure_latency(settings, architectures=architectures_of(origin), tokens=4)
    replace_object(str(tmp_path / "latency" / "here.json"), json.dumps(told).encode())
    bare = json.dumps({"table": told["table"]}).encode()  # as a device's owner may send it
    replace_object(str(tmp_path / "latency" / "phone.json"), bare)
    assert report.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    for words in ("What the UNet’s blocks take", "cross-attention, table-3", "Down-1", "Cross Attention"):
        assert words in page
    (found,) = metrics(tmp_path)["latency"]
    assert [unet["parameters"] for unet in found["unets"]] == [
        told["unets"][name]["parameters"] for name in ("origin", "table-3")
    ]


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
