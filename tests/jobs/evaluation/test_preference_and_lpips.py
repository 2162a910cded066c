"""PickScore, HPSv2 and LPIPS stand beside FID and CLIP, from the images that these are computed of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_run import evaluate_in_process
from latent_inputs import verify
from lpips_files import write_lpips
from preference_files import write_preferences

from jobs.evaluation.settings import Contender, EvaluationSettings, LpipsSettings, PromptSettings
from jobs.reports.charts import standalone_svg
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from pipelines.datasets.samples import recomputer
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.stages.settings import MetricSettings, Sampler, SamplingSettings
from pipelines.tables.schemas import from_png
from pipelines.tables.table import open_table
from snapfusion.metrics.lpips import Lpips, load_lpips
from snapfusion.metrics.preference import preference_scorer
from snapfusion.models.checksums import file_hash

CAPTIONS, DRAWS = 4, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    judging = MetricSettings.parse({"preferences": write_preferences(folder)})
    drawing = SamplingSettings(batch_size=5, images=True)
    settings = EvaluationSettings(
        contenders=(
            Contender(name="two", sampler=Sampler(steps=2)),
            Contender(name="one", sampler=Sampler(steps=1)),
        ),
        baseline="two",
        guidance=(1.0, 2.0),
        prompts=PromptSettings(limit=CAPTIONS, draws=DRAWS),
        references=ReferencesSettings(count=20),
        samples=SamplesSettings(drawing=drawing, judging=judging, rows_per_unit=5),
        lpips=LpipsSettings.parse(write_lpips(folder) | {"captions": 3}),
        kid_images=0,
        floor_redraws=0,
    )
    return folder, settings, evaluate_in_process(settings, folder / "evaluation")


def images_of(folder, name, *, w) -> dict[str, torch.Tensor]:
    rows = open_table(str(folder / "evaluation" / name)).read(["source_id", "w", "image"]).to_pylist()
    return {row["source_id"]: torch.tensor(from_png(row["image"])) for row in rows if row["w"] == w}


def batch_of(images) -> torch.Tensor:
    return torch.stack(list(images)).permute(0, 3, 1, 2)


def test_each_score_is_the_mean_over_the_images(made):
    folder, settings, results = made
    texts = {
        row["source_id"]: row["caption"]
        for row in open_table(str(folder / "evaluation/one")).read(["source_id", "caption"]).to_pylist()
    }
    images = images_of(folder, "one", w=2.0)
    point = results["curves"]["one"]["points"][1]
    for one in settings.samples.judging.preferences:
        scorer = preference_scorer(one.name, shape=one.shape, weights=Path(one.weights))
        scores = scorer.score(batch_of(images.values()), [texts[id_] for id_ in images])
        value, low, high = point[one.name]
        assert value == pytest.approx(float(scores.mean()), rel=1e-4)
        assert low < value < high


def test_lpips_is_the_mean_of_the_pairs_of_a_caption(made):
    folder, settings, results = made
    lpips = settings.lpips
    network = load_lpips("alex", backbone=Path(lpips.backbone), heads=Path(lpips.heads))
    images = images_of(folder, "one", w=2.0)
    captions = [id_ for id_ in images if "-draw" not in id_][:3]
    means = [
        network.pairwise(batch_of([images[id_], images[f"{id_}-draw1"], images[f"{id_}-draw2"]])).mean()
        for id_ in captions
    ]
    value, low, high = results["curves"]["one"]["points"][1]["lpips_within"]
    assert value == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)
    half = 1.96 * float(torch.stack(means).std()) / 3**0.5
    assert (high - value, value - low) == pytest.approx((half, half), rel=1e-3)


def test_differences_are_paired(made):
    _, _, results = made
    ours, theirs = (results["curves"][name]["points"][0] for name in ("one", "two"))
    for name in ("pickscore", "hpsv2"):
        difference = results["differences"]["one"][0][name]
        assert difference[0] == pytest.approx(ours[name][0] - theirs[name][0], abs=1e-9)


def test_the_protocol_names_the_weights(made):
    _, settings, results = made
    protocol = results["protocol"]
    for one in settings.samples.judging.preferences:
        expected = {"shape": one.shape, "sha256": file_hash(Path(one.weights))}
        assert protocol["preferences"][one.name] == expected
    backbone, heads = (file_hash(Path(file)) for file in (settings.lpips.backbone, settings.lpips.heads))
    files = {"backbone_sha256": backbone, "heads_sha256": heads}
    assert protocol["lpips"] == {"network": "alex", "captions": 3, **files}


def test_the_page_and_the_charts_have_them(made):
    _, settings, results = made
    page = render_evaluation(results)
    for name in ("PickScore", "HPSv2", "LPIPS of a caption"):
        assert page.count(f'data-label="{name}"') == 4
    assert "LPIPS by <b>alex</b>" in page
    for one in settings.samples.judging.preferences:
        assert f"SHA-256 {file_hash(Path(one.weights))[:12]}" in page
    charts = {chart.title: chart for chart in evaluation_charts(results)}
    assert {"PickScore over FID, along guidance", "HPSv2 over FID, along guidance"} < set(charts)
    chart = charts["HPSv2 over FID, along guidance"]
    assert chart.series[0].y == [point["hpsv2"][0] for point in results["curves"]["two"]["points"]]
    assert b"HPSv2" in standalone_svg(chart)


def test_nothing_is_computed_twice(made, monkeypatch):
    folder, settings, results = made
    monkeypatch.setattr(Lpips, "pairwise", lambda *_: pytest.fail("LPIPS was kept"))
    assert evaluate_in_process(settings, folder / "evaluation") == results


def test_a_unit_with_scores_is_recomputed(made):
    folder, settings, _ = made
    table = open_table(str(folder / "evaluation/one"))
    found = verify(table, recomputer(table, settings=settings.samples, model="mini"), units=2)
    assert (found.faults, found.recomputed) == ((), 2)
    assert table.columns[6:9] == ["clip", "pickscore", "hpsv2"]
    assert np.isfinite(table.read(["hpsv2"]).column("hpsv2").to_numpy()).all()
