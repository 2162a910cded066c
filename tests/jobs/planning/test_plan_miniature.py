"""The miniature's run, forecast by a probe and then measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(job: str, *, out: Path) -> str:
    """Output of a job run as a command, which starts its own Ray, as the forecast assumes."""
    command = [sys.executable, "-m", f"jobs.{job}", "--recipe", "mini", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_miniature_run_matches_its_forecast(tmp_path, capsys):
    run("plan", out=tmp_path)
    run("run_pipeline", out=tmp_path)
    output = run("plan", out=tmp_path)
    with capsys.disabled():
        print("\n" + output)
    compared = json.loads((tmp_path / "plan.json").read_text())["compared"]
    assert all(row["measured"] for row in compared)
    forecast, measured = (sum(row[name] for row in compared) for name in ("forecast", "measured"))
    assert forecast == pytest.approx(measured, rel=0.15)
    # The first step comes before most libraries; the others have them all.
    peaks = {row["name"]: row["driver_mib_measured"] / row["driver_mib_forecast"] for row in compared[1:]}
    assert {name: share for name, share in peaks.items() if not 0.7 < share < 1.15} == {}
