"""A run prints the settings that its steps read, and those that were given."""

import ast
import re

import pytest
from test_architecture import modules, reachable

from jobs import distill_steps, run_pipeline
from jobs.recipes.recipe import Recipe
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.unread import READERS, unread_by_pipeline

RECIPES_THEMSELVES = {"jobs.recipes.miniature", "jobs.recipes.stable_diffusion"}


def sections_read(module):
    """Sections of a recipe that a module reads: as attributes of `recipe`, or by name after `job`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", getattr(node.value, "attr", None))
            if owner == "recipe":
                yield node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and getattr(node.args[0], "id", None) == "job":
            yield from (
                str(one.value).split(".")[0] for one in node.args[1:] if isinstance(one, ast.Constant)
            )


def test_only_the_named_jobs_read_a_section():
    (start,) = (module for module in modules("jobs") if module.name == "jobs.run_pipeline")
    read = {module.name: {*sections_read(module)} for module in reachable(start)}
    assert "vpred" in read["jobs.finetune_vpred"]
    assert {"latents", "source"} <= read["jobs.encode_latents"]
    for name, sections in read.items():
        if name not in RECIPES_THEMSELVES:
            expected = {section for section in READERS if name.removeprefix("jobs.") in READERS[section]}
            assert sections & READERS.keys() <= expected, name
    assert READERS.keys() <= Recipe.model_fields.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_schedule_and_its_trainings_are_read(name):
    recipe = recipe_named(name)
    unread = unread_by_pipeline(recipe)
    assert f"schedules.{recipe.schedule}" not in unread
    assert ("vpred" in unread) == (name in ("mini", "ablation", "mini-efficient", "sd2"))
    assert {"evolution", "robust"} <= {*unread}


def printed_settings(job, words, capsys):
    assert job.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    return text, set(re.findall(r"^  ([\w.-]+) = ", text, re.MULTILINE))


def test_unread_settings_are_counted_unless_they_are_given(capsys, tiny_teacher):
    words = ["--recipe", "own", "--set", f"model={tiny_teacher}", "--set", "quota.rows=5"]
    text, shown = printed_settings(run_pipeline, words, capsys)
    # A single job prints all that differ.
    _, changed = printed_settings(distill_steps, words, capsys)
    assert {"pairs.rows_per_unit", "vpred.trainer.micro_batch", "quota.rows"} <= shown < changed
    assert "evolution.samples.rows_per_unit" in changed - shown
    assert f"\n  and {len(changed - shown)} that no step of this run reads" in text
    assert changed <= printed_settings(run_pipeline, [*words, "--verbose"], capsys)[1]
