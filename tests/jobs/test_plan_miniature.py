"""The miniature's run, forecast by a probe and then measured, in one sitting."""

from __future__ import annotations

import json

import pytest

from jobs import plan, run_pipeline


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_the_miniatures_run_takes_what_was_forecast(ray_cluster, tmp_path, capsys):
    out = ["--recipe", "mini", "--out", str(tmp_path)]
    assert plan.main(out) == 0
    assert run_pipeline.main(out) == 0
    capsys.readouterr()
    assert plan.main(out) == 0
    told = capsys.readouterr().out
    with capsys.disabled():
        print("\n" + told)
    compared = json.loads((tmp_path / "plan.json").read_text())["compared"]
    assert all(row["measured"] for row in compared)
    forecast, measured = (sum(row[name] for row in compared) for name in ("forecast", "measured"))
    assert forecast == pytest.approx(measured, rel=0.15)
