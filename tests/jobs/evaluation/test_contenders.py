"""Contenders with guidance and negative prompts of their own stand on the same axes."""

import numpy as np
import pytest
from evaluated_run import evaluate_in_process

from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from pipelines.datasets.samples import read_features
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.stages.settings import Sampler, SamplingSettings
from pipelines.tables.table import open_table
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.settings import SettingsError

NEGATIVE = "a small blue square at the bottom on a gray background"
SETTINGS = EvaluationSettings(
    contenders=(
        Contender(name="plain", sampler=Sampler(steps=2)),
        Contender(name="free", sampler=Sampler(steps=2), guidance=()),
        Contender(name="high", sampler=Sampler(steps=2), guidance=(2.0, 3.0)),
        Contender(name="away", sampler=Sampler(steps=2, negative_prompt=NEGATIVE)),
    ),
    baseline="plain",
    guidance=(1.0, 2.0),
    prompts=PromptSettings(limit=8),
    references=ReferencesSettings(count=150),
    samples=SamplesSettings(drawing=SamplingSettings(batch_size=8), rows_per_unit=8),
    groups=2,
    kid_images=0,
    floor_redraws=0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "evaluation"
    HalfDecoder.from_vae(load("mini").vae).save(str(out / "half"))
    half = Contender(name="half", sampler=Sampler(steps=2), decoder=str(out / "half"), guidance=(2.0,))
    settings = SETTINGS.model_copy(update={"contenders": (*SETTINGS.contenders, half)})
    return out, evaluate_in_process(settings, out)


def test_each_has_its_own_scales(made):
    _, results = made
    points = {
        name: [(point["w"], point["evaluations"]) for point in curve["points"]]
        for name, curve in results["curves"].items()
    }
    assert points == {
        "plain": [(1.0, 2), (2.0, 4)],
        "free": [(1.0, 2)],
        "high": [(2.0, 4), (3.0, 4)],
        "away": [(1.0, 2), (2.0, 4)],
        "half": [(2.0, 4)],
    }
    assert all(0.0 < p["seconds"] < 600.0 for curve in results["curves"].values() for p in curve["points"])
    assert (SETTINGS.num_points, SETTINGS.num_evaluations) == (7, 22)


def test_differences_are_at_the_scales_of_both(made):
    _, results = made
    scales = {name: [one["w"] for one in each] for name, each in results["differences"].items()}
    assert scales == {"free": [1.0], "high": [2.0], "away": [1.0, 2.0], "half": [2.0]}
    assert results["differences"]["free"][0]["fid"] == [0.0, 0.0, 0.0]
    assert "one guidance alone" in results["equal_fid"]["free"]["no_reading"]


def test_one_point_is_on_the_charts_and_the_page(made):
    _, results = made
    charts = list(evaluation_charts(results))
    assert [len(series.x) for series in charts[0].series] == [2, 1, 2, 2, 1]
    page = render_evaluation(results)
    assert page.count('data-label="seconds"') == 8
    assert page.count('data-label="UNet passes"') == 8


def test_a_negative_prompt_changes_guided_images_alone(made):
    out, _ = made
    plain, away = (open_table(str(out / name)) for name in ("plain", "away"))
    assert "negative_prompt" not in plain.identity["sampler"]
    assert away.identity["sampler"]["negative_prompt"] == NEGATIVE
    for w, same in ((1.0, True), (2.0, False)):
        ours, theirs = (read_features(table, source="scenes", w=w) for table in (plain, away))
        assert np.array_equal(ours, theirs) == same


def test_a_decoder_changes_images_but_not_their_noise(made):
    out, results = made
    plain, half = (open_table(str(out / name)) for name in ("plain", "half"))
    assert "decoder" not in plain.identity
    assert results["curves"]["half"]["decoder"] == str(out / "half")
    ours, theirs = (read_features(table, source="scenes", w=2.0) for table in (plain, half))
    assert not np.allclose(ours, theirs)
    noise = [
        {row["id"]: row["noise_key"] for row in table.read(["id", "noise_key"]).to_pylist()}
        for table in (plain, half)
    ]
    assert noise[1].items() <= noise[0].items()


@pytest.mark.parametrize(
    ("contenders", "message"),
    [
        ('[{"name":"plain","guidance":[2.0,1.0]}]', "guidance of contender 'plain' must be increasing"),
        ('[{"name":"plain","guidance":[0.5]}]', "greater than or equal to 1"),
        ('[{"name":"plain"},{"name":"plain","guidance":[2.0]}]', "names of contenders repeat"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(contenders, message):
    with pytest.raises(SettingsError, match=message):
        SETTINGS.with_values([f"contenders={contenders}"])
