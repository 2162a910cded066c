"""Report of a run: collected from what is committed; it fails if images do not show their captions."""

import json
import shutil
from pathlib import Path

import pytest
from reported_run import CAPTIONS, make_pairs, make_student, reported
from scene_latents import encode_scenes

from jobs import forget, report
from jobs import measure_latency as latency_job
from jobs.evaluation.latency import measure_latency
from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import architectures_of
from jobs.reports import side_by_side
from jobs.training.initial_weights import own_architecture, with_architecture
from pipelines.sources.captions import Caption
from pipelines.storage.objects import read_bytes, replace_object
from pipelines.tables.table import open_table
from snapfusion.export.layout import FORMAT_VERSION
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.checksums import file_hash
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of


def test_a_run_with_pairs_alone_is_reported(tmp_path):
    make_pairs(tmp_path)
    page, metrics = reported(tmp_path)
    assert CAPTIONS[0].text in page
    assert "5 of 5 attributes" in page
    assert metrics["oracle"]["images"] == 8
    assert metrics["tables"]["pairs"]["rows_read"] == metrics["tables"]["pairs"]["rows_written"] == 8
    assert metrics["decoder"] is None
    assert "The miniature does not know this caption." not in page


def test_student_is_compared_with_teacher_and_initialization(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "NUM_CAPTIONS", 6)
    make_student(tmp_path)
    page, metrics = reported(tmp_path)
    for words in (
        "50 steps · 5/5",
        "Undistilled",
        "4 steps · ",
        "6 held-out captions",
        "distilled from 8",
        "CLIP scorer",
    ):
        assert words in page
    for words in ("distillation loss", "vanilla", "guided", "TEACHER OF STEPS", "STUDENT", "initial weights"):
        assert words in page
    assert metrics["student"]["distillation"]["steps"] == 4
    assert "curve" not in metrics["student"]
    comparison = metrics["fewer_steps"]
    assert (comparison["guidance"], comparison["captions"]) == (6.0, 6)
    models = comparison["ways"]
    assert [(name, model["steps"]) for name, model in models.items()] == [
        *(("student", 4), ("teacher", 50), ("undistilled", 4))
    ]
    assert models["teacher"]["distance"] == 0.0 < models["undistilled"]["distance"]
    assert models["teacher"]["attributes_right"] > 0.9
    # Saved in float16, the student differs from its initial weights by rounding alone.
    assert models["student"]["distance"] == pytest.approx(models["undistilled"]["distance"], rel=0.05)
    gain = comparison["clip_gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert gain["value"] == pytest.approx(0.0, abs=0.01)


def test_an_efficient_student_has_its_parents_and_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "NUM_CAPTIONS", 4)
    shape = efficient_architecture(own_architecture("mini-v"))
    # As `jobs.train_efficient` leaves them, of a model that was not trained.
    for name in ("efficient-first", "efficient"):
        with_architecture("mini-v", shape, url=str(tmp_path / name))
    (tmp_path / "efficient" / "metrics.json").write_text("{}")
    assert latency_job.main(["--out", str(tmp_path), "--set", "latency.turns=3"]) == 0
    make_student(tmp_path, initial=str(tmp_path / "efficient"))
    set_disturbed(tmp_path, False)
    page, metrics = reported(tmp_path)
    for words in ("EFFICIENT", "TEACHER OF STEPS", "UNet time per image", "Down-1"):
        assert words in page
    assert "INITIAL WEIGHTS" not in page
    unets = {unet["name"]: unet for unet in metrics["latency"][0]["unets"]}
    ratio = 50 * unets["origin"]["measured_ms"] / (4 * unets["table-3"]["measured_ms"])
    assert f"{ratio:,.4g} x" in page
    set_disturbed(tmp_path, True)
    page, _ = reported(tmp_path)
    assert "No time here is a result" in page
    assert "UNet time per image" not in page


def set_disturbed(run, disturbed):
    """As if the machine had done other work during the measurement, or had not."""
    [file] = (run / "latency").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"disturbed": disturbed}))


def test_without_a_floor_no_student_is_sampled(tmp_path):
    make_student(tmp_path)
    page, metrics = reported(tmp_path, "--set", "oracle_floor=null")
    assert metrics["fewer_steps"] is None
    assert "No student was sampled." in page


def test_other_weights_than_the_measured_are_named(tmp_path, capsys):
    make_student(tmp_path)
    record, weights = tmp_path / "student/metrics.json", "model/unet/diffusion_pytorch_model.safetensors"
    recorded = {"weight_files": {weights: file_hash(tmp_path / "student" / weights)}}
    record.write_text(json.dumps(json.loads(record.read_text()) | recorded))
    page, metrics = reported(tmp_path, "--set", "oracle_floor=null")
    assert metrics["other_weights"] == []
    make_swapped(tmp_path / "student/model")
    page, metrics = reported(tmp_path, "--set", "oracle_floor=null")
    [sentence] = metrics["other_weights"]
    assert sentence.startswith(f"student/{weights} has other weights")
    assert sentence in page
    assert sentence in capsys.readouterr().out


def make_swapped(folder: Path) -> None:
    """Another sound model in place of a student's."""
    shutil.rmtree(folder)
    save(load("mini"), folder)


@pytest.mark.slow
def test_timed_blocks_are_shown_if_there_are_any(tmp_path):
    assert 'id="blocks"' not in reported(tmp_path)[0]
    settings, origin = LatencySettings(turns=2), architecture_of(load("mini-v").unet)
    record = measure_latency(settings, architectures=architectures_of(origin), tokens=4)
    # The second file is a bare table, as the owner of a device may send it.
    for name, content in (("here", record), ("phone", {"table": record["table"]})):
        replace_object(str(tmp_path / "latency" / f"{name}.json"), json.dumps(content).encode())
    page, metrics = reported(tmp_path)
    for words in ('id="blocks"', "cross-attention, table-3", "Down-1", "Cross Attention"):
        assert words in page
    (latency,) = metrics["latency"]
    assert [unet["parameters"] for unet in latency["unets"]] == [
        record["unets"][name]["parameters"] for name in ("origin", "table-3")
    ]


def test_a_bundle_has_commands_and_its_page(tmp_path):
    assert 'id="usage"' not in reported(tmp_path)[0]
    empty = {"variants": {}, "captions": [], "identity": {"parents": {}}, "settings_hash": "5" * 64}
    manifest = json.dumps({"format": FORMAT_VERSION, **empty}).encode()
    replace_object(f"{tmp_path}/mobile/manifest.json", manifest)
    replace_object(f"{tmp_path}/mobile/web/index.html", b"a page")
    page, _ = reported(tmp_path)
    assert f"snapfusion serve mini {tmp_path}/student --bundle {tmp_path}/mobile" in page
    assert 'href="../mobile/web/index.html"' in page


def test_images_below_the_floor_fail_after_writing(tmp_path, capsys):
    make_pairs(tmp_path, guidance=80.0)
    _, metrics = reported(tmp_path, code=1)
    assert "oracle_floor of 95%" in capsys.readouterr().err
    assert metrics["oracle"]["mean_attributes_right"] < 0.95


def test_captions_that_are_no_scenes_are_not_scored(tmp_path):
    make_pairs(tmp_path, captions=[Caption(id="0", ordinal=0, text="<b>a dog</b>")])
    page, metrics = reported(tmp_path)
    assert metrics["oracle"] is None
    assert "<b>a dog</b>" not in page
    assert page.count("The miniature does not know this caption.") == 1


def test_a_report_is_written_to_a_bucket_again(bucket):
    out = f"{bucket}/run"
    for _ in range(2):  # of a run without any commit
        assert report.main(["--out", out]) == 0
    assert b"Recipe mini" in read_bytes(f"{out}/report/index.html")
    assert json.loads(read_bytes(f"{out}/metrics.json"))["tables"] == {}


def test_an_existing_page_is_replaced_whole(tmp_path):
    path = tmp_path / "report" / "index.html"
    for text in (b"first", b"second"):
        replace_object(str(path), text)
    assert path.read_bytes() == b"second"
    assert [other.name for other in path.parent.iterdir()] == ["index.html"]


def test_scenes_are_committed_rows(tmp_path):
    """A caption that the selection rejected, or that was deleted, is on no page."""
    url = encode_scenes(tmp_path, count=16)
    rows = open_table(url).read_unit(open_table(url).units[0], ["id", "caption"]).to_pylist()
    shown, _ = reported(tmp_path)
    assert all(row["caption"] in shown for row in rows)
    (tmp_path / "ids.txt").write_text(f"{rows[0]['id']}\n")
    assert forget.main(["--out", str(tmp_path), "--id", str(tmp_path / "ids.txt")]) == 0
    after, _ = reported(tmp_path)
    assert rows[0]["caption"] not in after
    assert all(row["caption"] in after for row in rows[1:])
    cached = (tmp_path / "report" / "cache" / "scenes.json").read_text()
    assert rows[0]["caption"] not in cached
