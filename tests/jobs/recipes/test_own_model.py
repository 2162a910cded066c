"""Recipes for a model of one's own: everything that follows from the model is that model's."""

import json

import pytest
from conftest import tiny_bundle

from jobs import command
from jobs.cli.config_file import read_config
from jobs.cli.job import resolve_recipe
from jobs.recipes.dataflow import missing_inputs, missing_values
from jobs.recipes.recipe import EXAMPLE_BUCKET
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.teacher import Teacher
from jobs.recipes.verbs import initial_verbs, pipeline_verbs
from jobs.training.sources import RECIPE_MODEL, VPRED_MODEL
from snapfusion.models.errors import ModelError
from snapfusion.models.save import save
from snapfusion.settings import flatten

PIPELINES = ("mini", "own", "sd15", "sd2")


@pytest.fixture(scope="module")
def v_model(tmp_path_factory):
    bundle = tiny_bundle()
    bundle.prediction_type = "v_prediction"
    folder = tmp_path_factory.mktemp("predicts-v") / "v"
    save(bundle, folder)
    return str(folder)


def missing(recipe):
    return missing_inputs(recipe, pipeline_verbs(recipe), exists=lambda _: False)


def strings(recipe):
    return [value for _, value in flatten(recipe.to_values()) if isinstance(value, str)]


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_of_the_miniature_remains(name, tiny_teacher):
    recipe = resolve_recipe(name, [f"model={tiny_teacher}"])
    assert "mini-v" not in json.dumps(recipe.to_values())
    assert recipe.model == tiny_teacher
    assert recipe.mobile.licence.weights is None
    assert recipe.mobile.licence.data is None
    assert recipe.oracle_floor is None
    assert recipe.mobile.guidance == recipe.pairs.generation.guidance == 7.5
    assert not any("white background" in caption for caption in recipe.mobile.captions)


@pytest.mark.parametrize("name", ["ablation", "mini-efficient"])
def test_guidance_of_ablations_follows_from_the_model(name, tiny_teacher):
    panels = resolve_recipe(name, [f"model={tiny_teacher}"]).ablation
    ranges = {(one.steps.cfg_range.low, one.steps.cfg_range.high) for one in panels.variants if one.steps}
    assert ranges == {(2.0, 14.0), (2.0, 8.0)}
    names = [line.name for panel in panels.panels if panel.name == "6d" for line in panel.lines]
    assert {"p0.1-w2to8", "p0.1-w2to14"} < set(names)
    assert not any("w1to" in name for name in names)


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_predicts_v_is_its_own_v_model(name, v_model, tiny_teacher):
    for model, expected in [(v_model, RECIPE_MODEL), (tiny_teacher, VPRED_MODEL)]:
        recipe = resolve_recipe(name, [f"model={model}"])
        assert recipe.efficient.begin == expected
        assert recipe.schedules["direct"][0].teacher == expected
        verbs = {*pipeline_verbs(recipe), *initial_verbs(recipe.model_copy(update={"schedule": "direct"}))}
        assert ("finetune_vpred" in verbs) == (expected == VPRED_MODEL)


def test_sizes_follow_from_the_model(tiny_teacher):
    recipe = resolve_recipe("own", [f"model={tiny_teacher}"])
    assert recipe.download.fetching.image_size == recipe.latents.selection.min_width == 16
    assert recipe.vpred.trainer.micro_batch == 64


@pytest.mark.parametrize("name", ["own", "sd15", "sd15-1gpu", "sd2"])
def test_timing_the_decoder_takes_no_more_memory_than_training_it(name):
    decoder = recipe_named(name).decoder
    assert max(decoder.timing_batches) <= decoder.trainer.micro_batch


@pytest.mark.parametrize(("side", "rows"), [(1024, 2), (768, 4), (640, 4), (512, 8), (256, 32), (64, 64)])
def test_a_batch_has_about_as_many_pixels(side, rows):
    assert Teacher(model="m", side=side, v_model="m").micro_batch == rows


@pytest.mark.parametrize("config", [True, False], ids=["config", "set"])
def test_an_assignment_comes_before_what_follows_from_the_model(config, tiny_teacher):
    given = [f"model={tiny_teacher}", "distill.teacher=mini-v", "pairs.generation.guidance=3.0"]
    recipe = resolve_recipe("mini", [] if config else given, config=given if config else [])
    assert recipe.distill.teacher == "mini-v"
    assert recipe.pairs.generation.guidance == 3.0
    assert recipe.mobile.guidance == 7.5


def test_a_missing_model_is_named():
    with pytest.raises(ModelError, match="there is no model folder or file"):
        resolve_recipe("own", ["model=./none"])


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_finds_what_it_reads(name, tiny_teacher, v_model):
    models = (None, tiny_teacher, v_model)
    for model in models:
        recipe = recipe_named(name, model=model)
        assert missing(recipe) == []
        assert pipeline_verbs(recipe)[-1] == "compile_mobile"
        assert {"distill_steps", "distill_schedule"} & set(pipeline_verbs(recipe))
        assert ("evaluate" in pipeline_verbs(recipe)) == (name != "mini")


@pytest.mark.parametrize(
    ("key", "source", "verb"),
    [
        ("mobile.model", "run:other/model", "compile_mobile"),
        ("efficient.begin", "run:robust/model", "train_efficient"),
        ("efficient.architecture", "run:evolution/a.json", "train_efficient"),
        ("captions.url", "run:captions.txt", "generate_pairs"),
        ("distill.student", "run:student/model", "distill_steps"),
    ],
)
def test_an_input_that_nothing_makes_is_named(key, source, verb):
    recipe = resolve_recipe("mini", [f"{key}={source}"])
    assert missing(recipe) == [f"{key} is {source}, which no step before {verb} makes"]
    assert missing_inputs(recipe, pipeline_verbs(recipe), exists=lambda _: True) == []


def test_a_stage_that_reads_a_later_one_is_named():
    recipe = recipe_named("sd15")
    first, *others = recipe.stages
    schedules = {"staged": (first.model_copy(update={"teacher": "run:staged-8/model"}), *others)}
    (line,) = missing(recipe.model_copy(update={"schedules": schedules}))
    assert line == "schedules.staged[0].teacher is run:staged-8/model, which no step before teacher-16 makes"


def test_weights_that_are_not_there_are_named(tmp_path):
    mini = recipe_named("mini")
    settings = f'[{{"name":"hpsv2","weights":"{tmp_path}/hpsv2.safetensors"}}]'
    recipe = mini.with_values([f"evaluation.samples.judging.preferences={settings}"])
    verbs = [*pipeline_verbs(recipe), "evaluate"]
    (line,) = missing_values(recipe, verbs)
    assert line.startswith("evaluation.samples.judging.preferences[0].weights: there is no file")
    (tmp_path / "hpsv2.safetensors").touch()
    assert missing_values(recipe, verbs) == []
    settings = '[{"name":"hpsv2","weights":"memory://weights/hpsv2.safetensors"}]'
    recipe = mini.with_values([f"evaluation.samples.judging.preferences={settings}"])
    (line,) = missing_values(recipe, verbs)
    assert line.endswith("there is no memory://weights/hpsv2.safetensors")


def test_examples_and_licences_are_asked_for():
    recipe = recipe_named("own")
    lines = missing_values(recipe, pipeline_verbs(recipe))
    keys = ("model", "source.url", "evaluation.prompts.url", "evaluation.references.url")
    assert [line.split()[0] for line in lines[:4]] == list(keys)
    assert sum("mobile.licence" in line.split()[0] for line in lines) == 2
    # A licence of weights is no example of a licence of data.
    assert "OpenRAIL" not in next(line for line in lines if line.startswith("mobile.licence.data"))
    mini = recipe_named("mini")
    assert missing_values(mini, pipeline_verbs(mini)) == []
    assert not any(value.startswith(EXAMPLE_BUCKET) for value in strings(mini))


def test_a_file_of_all_settings_fixes_what_follows_from_the_model(v_model, capsys, tmp_path):
    assert command.main(["recipes", "own"]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    recipe = resolve_recipe("own", [f"model={v_model}"], config=read_config(str(tmp_path / "all.yaml")))
    assert recipe == recipe_named("own").with_values([f"model={v_model}"])
    # So the v model that it would derive is not taken.
    assert recipe.efficient.begin == VPRED_MODEL
    assert resolve_recipe("own", [f"model={v_model}"]).efficient.begin == RECIPE_MODEL
