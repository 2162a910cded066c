"""Kept parts of a report: a second report needs no model, a changed input is computed again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reported_run import make_pairs, make_student, reported
from scene_latents import encode_scenes

from jobs import measure_latency
from jobs.reports import side_by_side
from snapfusion.models.load import load
from snapfusion.models.save import save

ROOT = Path(__file__).parents[3]
NUM_CAPTIONS = 4
PROGRAM = f"""
import sys
from jobs.reports import side_by_side
side_by_side.NUM_CAPTIONS = {NUM_CAPTIONS}
from jobs import report
code = report.main(["--out", sys.argv[1]])
print("loaded", *sys.modules)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    monkeypatch.setattr(side_by_side, "NUM_CAPTIONS", NUM_CAPTIONS)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with a part of every kind but a decoder, and its report; not to be changed."""
    out = tmp_path_factory.mktemp("whole")
    make_pairs(out)
    make_student(out)
    encode_scenes(out, count=8)
    assert measure_latency.main(["--out", str(out), "--set", "latency.turns=2"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "NUM_CAPTIONS", NUM_CAPTIONS)
        page, metrics = reported(out)
    return out, page, metrics


def kept(run):
    """Contents of the cache, by part."""
    return {path.stem: path.read_bytes() for path in (run / "report" / "cache").iterdir()}


def test_a_second_report_is_equal_and_loads_no_model(whole_run):
    run, page, metrics = whole_run
    assert kept(run).keys() == {"latencies", "models", "oracle", "scenes", "student", "weights"}
    command = [sys.executable, "-c", PROGRAM, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert loaded & {"torch", "diffusers", "transformers", "open_clip"} == set()
    assert "is damaged (" not in done.stdout
    assert (run / "report" / "index.html").read_text() == page
    assert json.loads((run / "metrics.json").read_text()) == metrics


def test_a_changed_student_is_sampled_again(whole_run, tmp_path):
    whole, page, metrics = whole_run
    run = shutil.copytree(whole, tmp_path / "run")
    before = kept(run)
    student = load(str(run / "student" / "model"))
    for weights in student.unet.conv_out.parameters():
        weights.data.mul_(0.5)
    save(student, run / "student" / "model", distillation=student.distillation)
    changed_page, changed = reported(run)
    ways, changed_ways = metrics["fewer_steps"]["ways"], changed["fewer_steps"]["ways"]
    assert changed_ways["teacher"] == ways["teacher"]
    assert changed_ways["student"]["distance"] != ways["student"]["distance"]
    assert changed_page != page
    after = kept(run)
    assert {name for name in before if after[name] != before[name]} == {"student", "weights"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"\x00" + data,
        lambda data: data.replace(b"5 of 5", b"4 of 5"),
        lambda data: b"[]",
    ],
    ids=["truncated", "not text", "altered", "something else"],
)
def test_a_damaged_part_is_computed_again(whole_run, capsys, damage):
    run, page, _ = whole_run  # which is whole again afterwards
    before, file = kept(run), run / "report" / "cache" / "oracle.json"
    file.write_bytes(damage(file.read_bytes()))
    assert reported(run)[0] == page
    lines = [line for line in capsys.readouterr().out.splitlines() if f"{file} is damaged (" in line]
    assert len(lines) == 1
    assert kept(run) == before
