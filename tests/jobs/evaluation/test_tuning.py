"""Guidance and the contender of a family are chosen on captions that are not compared on."""

import pytest
from evaluated_run import evaluate_in_process

from jobs.evaluation.captions import captions_of
from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings, TuningSettings
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.stages.settings import Sampler, SamplingSettings
from snapfusion.mini.split import captions_in
from snapfusion.settings import SettingsError

RESCALED = [
    Contender(name=f"rescale{share:g}", sampler=Sampler(steps=1, guidance_rescale=share), family="rescale")
    for share in (0.3, 0.7)
]
SETTINGS = EvaluationSettings(
    contenders=(Contender(name="two", sampler=Sampler(steps=2)), *RESCALED),
    baseline="two",
    guidance=(1.0, 2.0),
    prompts=PromptSettings(name="test", split="test", limit=6, draws=2),
    references=ReferencesSettings(name="test", split="test", count=240),
    tuning=TuningSettings(
        prompts=PromptSettings(name="validation", split="validation", limit=6, draws=2),
        references=ReferencesSettings(name="validation", split="validation", count=120),
    ),
    samples=SamplesSettings(drawing=SamplingSettings(batch_size=12), rows_per_unit=12),
    floor_redraws=0,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return evaluate_in_process(SETTINGS, tmp_path_factory.mktemp("run") / "evaluation")


def test_one_contender_of_a_family_is_compared(results):
    best = results["tuning"]["best"]
    assert set(best) == {"two", "rescale0.3", "rescale0.7"}
    assert [best[name]["evaluations"] for name in best] == [
        steps * (1 if best[name]["w"] == 1.0 else 2) for name, steps in zip(best, (2, 1, 1), strict=True)
    ]
    assert all(0.0 < each["seconds"] < 600.0 for each in best.values())
    chosen = min(("rescale0.3", "rescale0.7"), key=lambda name: best[name]["fid"][0])
    assert results["tuning"]["families"] == {"rescale": chosen}
    assert set(results["curves"]) == {"two", chosen}


def test_guidance_is_that_with_the_lowest_fid_on_other_captions(results):
    curve = results["curves"]["two"]
    assert curve["best_w"] == results["tuning"]["best"]["two"]["w"]
    assert curve["points"][0]["fid"] != results["tuning"]["best"]["two"]["fid"]
    charts = list(evaluation_charts(results))
    assert charts[-1].x_label == "UNet passes per image"
    best = next(point for point in curve["points"] if point["w"] == curve["best_w"])
    assert charts[-1].series[0].x == [best["evaluations"]]
    assert "A star marks" in render_evaluation(results)


def test_every_caption_has_each_draw(results):
    captions = results["protocol"]["captions"]
    assert (captions["draws"], captions["listed"], captions["compared"]) == (2, 6, 6)
    rows = captions_of(SETTINGS.prompts)
    assert len({row.id for row in rows}) == 12
    assert [row.text for row in rows[:6]] == [row.text for row in rows[6:]]
    assert {row.text for row in rows} <= set(captions_in("test"))
    assert SETTINGS.prompts.num_images == 12


def test_the_whole_split_is_taken_by_default():
    prompts = PromptSettings(name="test", split="test")
    assert {row.text for row in captions_of(prompts)} == set(captions_in("test"))
    assert prompts.num_images == 240


def test_a_list_with_captions_of_another_split_is_refused(tmp_path):
    trained = captions_in("training")[0]
    (tmp_path / "list.txt").write_text("\n".join([captions_in("test")[0], trained]) + "\n")
    prompts = PromptSettings(url=str(tmp_path / "list.txt"), split="test")
    with pytest.raises(ValueError, match=f"'{trained}' is of the miniature's training split"):
        captions_of(prompts)
    assert len(captions_of(prompts.model_copy(update={"split": None}))) == 2


def test_captions_of_ones_own_are_of_no_split(tmp_path):
    (tmp_path / "list.txt").write_text("a dog\na cat\n")
    prompts = PromptSettings(url=str(tmp_path / "list.txt"), split="validation", draws=2)
    assert [row.text for row in captions_of(prompts)] == ["a dog", "a cat"] * 2
    assert prompts.num_images == 2 * prompts.limit


def test_tuning_captions_are_not_compared_on(tmp_path):
    prompts = PromptSettings(name="again", split="test", limit=6)
    tuning = SETTINGS.tuning.model_copy(update={"prompts": prompts})
    with pytest.raises(ValueError, match=r"prompts 'test' and tuning.prompts 'again' both have 'a "):
        evaluate_in_process(SETTINGS.model_copy(update={"tuning": tuning}), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tuning": None}, "'rescale0.3' is of a family, which needs tuning"),
        ({"baseline": "rescale0.3"}, "'rescale0.3' is compared in any case"),
        (
            {"gaps": [{"student": "two", "few": "rescale0.3", "many": "two", "w": 2.0}]},
            "'rescale0.3' is compared in any case",
        ),
        ({"prompts": SETTINGS.tuning.prompts.to_values()}, "both named 'validation'"),
        ({"prompts": {"draws": 1_001}}, "less than or equal to 1000"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        EvaluationSettings.parse(SETTINGS.to_values() | values)
