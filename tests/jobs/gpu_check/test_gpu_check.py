"""The check of a device: refused without one, resumed by part, and its rates are the planner's."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch

from jobs.gpu_check.__main__ import main
from jobs.gpu_check.device_load import DeviceLoad
from jobs.gpu_check.page import page
from jobs.gpu_check.runner import result_of, run_parts
from jobs.gpu_check.settings import PARTS, SIZES
from jobs.gpu_check.training import Trainings
from jobs.planning.rates_and_prices import Rates

MINI = SIZES["mini"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_what_is_needed(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "needs a CUDA device of 24 GiB" in line
    assert "--size mini" in line
    assert not (tmp_path / "out").exists()


def test_a_step_is_timed_and_weights_stay():
    trainings = Trainings(MINI)
    before = {name: weight.clone() for name, weight in trainings.unet.state_dict().items()}
    record = trainings.measure("velocity")
    assert set(record["ms"]) == {"model"}
    assert record["ms"]["model"] > 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in trainings.unet.state_dict().items())


def test_a_done_part_is_not_repeated(tmp_path):
    done = {"status": "done", "seconds": 1.0, "result": {"tests": 5, "ms": {"model": 2.0}}}
    (tmp_path / "tests.json").write_text(json.dumps(done))
    skipped = {"status": "skipped", "seconds": 0.1, "reason": "there is one device"}
    (tmp_path / "nccl.json").write_text(json.dumps(skipped))
    assert run_parts(["tests"], MINI, tmp_path) == []
    assert result_of("tests", tmp_path) == done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nccl.json", "tests.json"]
    text = page(MINI, tmp_path, device="a device")
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(PARTS)
    assert "| tests | 5 |\n| ms, model | 2 |" in text
    assert "Skipped: there is one device." in text
    assert text.count("Not done.") == len(PARTS) - 2


def test_a_busy_core_is_seen():
    with DeviceLoad(MINI) as load:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            pass
    assert 0.0 < load.busy_share <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_small_check_runs_whole(tmp_path):
    command = [sys.executable, "-m", "jobs.gpu_check", "--size", "mini", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "mini"
    records = {name: result_of(name, folder) for name in PARTS}
    assert {name for name, record in records.items() if record["status"] != "done"} == set()
    results = {name: record["result"] for name, record in records.items()}
    assert results["tests"]["skipped"] == 0
    assert 0.0 < results["generation"]["eager"]["share_of_peak"] < 1.0
    for name in ("fsdp", "nccl"):
        assert results[name]["workers"] == 2
        assert results[name]["largest_relative_difference"] < 1e-4
    assert Rates.read(str(folder / "rates.json")).rates["pass"]
    assert "Not done." not in (folder / "gpu.md").read_text()
