"""Jobs read the caption lists that the recipe gives, by the recipe's columns."""

import json
from pathlib import Path

import pytest
from set_options import set_options

from jobs import evaluate, evolve_unet, generate_pairs
from jobs.cli import resources
from jobs.cli.job import Job, resolve_recipe
from jobs.generate_pairs import captions_for
from jobs.recipes.recipe import Recipe
from pipelines.ray_data import execution


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three annotations of two images."""
    rows = [(7, "a"), (7, "b"), (8, "c")]
    annotations = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(rows)]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": annotations}))
    return path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {"000000000": "a", "000000001": "b", "000000002": "c"}),
        (["captions.reading.id_column=image_id"], {"7": "a", "8": "c"}),
        (["captions.reading.id_column=image_id", "captions.limit=1"], {"7": "a"}),
        (
            ["captions.reading.id_column=id", "captions.reading.max_caption_chars=1"],
            {"0": "a", "1": "b", "2": "c"},
        ),
    ],
)
def test_the_recipe_names_the_columns(tmp_path, coco, settings, expected):
    recipe = resolve_recipe("mini", [f"captions.url={coco}", *settings])
    captions, _ = captions_for(Job(verb="generate_pairs", recipe=recipe, out=str(tmp_path / "run")))
    assert {row.id: row.text for row in captions} == expected


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        (generate_pairs, "captions"),
        (evaluate, "evaluation.prompts"),
        (evolve_unet, "evolution.prompts"),
    ],
)
def test_a_dry_run_samples_the_list(tmp_path, coco, capsys, verb, key):
    words = ["--dry-run", "--out", str(tmp_path / "run")]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{\n{"prompt": "c"}\n')
    for url, line in (
        (coco, "sampled 3 rows of {}: 3 captions, none rejected"),
        (bad, "sampled 3 rows of {}: 2 captions, 1 rejected (1 bad_row)"),
    ):
        assert verb.main([*words, *set_options([f"{key}.url={url}"])]) == 0
        assert line.format(url) in capsys.readouterr().out
    column = [f"{key}.url={coco}", f"{key}.reading.caption_column=text"]
    assert verb.main([*words, *set_options(column)]) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "no caption column named text; it has image_id, id, caption: set caption_column to one of them\n"
    )
    assert error.count("\n") == 1


def test_settings_of_version_0_1_are_read():
    """Their lists had a default column, which is still the first that is looked for."""
    values = resolve_recipe("mini", []).to_values()
    del values["captions"]["reading"]
    values["evaluation"]["prompts"]["reading"]["caption_column"] = "caption"
    recipe = Recipe.parse(values)
    assert recipe.captions.reading.caption_column is None
    assert recipe.evaluation.prompts.reading.caption_column == "caption"


def test_units_are_planned_as_ray_takes_them(tmp_path, monkeypatch):
    planned, connected = [], []

    def units():
        for number in range(3):
            planned.append(number)
            yield number

    def taken_one_by_one(items, _):
        for item in items:
            assert planned == list(range(item + 1))
            yield item

    monkeypatch.setattr(resources, "connect_for", lambda *_: connected.append(list(planned)))
    monkeypatch.setattr(execution, "run_on_ray", taken_one_by_one)
    job = Job(verb="generate_pairs", recipe=resolve_recipe("mini", []), out=str(tmp_path / "run"))
    run = resources.runner(job, "pairs")
    assert list(run([], [])) == connected == []
    assert list(run(units(), [])) == [0, 1, 2]
    assert connected == [[0]]
