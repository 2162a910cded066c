"""`jobs.compute_targets`: makes TARGETS from the run's LATENTS, which verify them."""

import pytest
from in_process import in_process
from set_options import set_options

from jobs import compute_targets, encode_latents, render_scenes, verify_table
from jobs.recipes.registry import RECIPES, recipe_named
from pipelines.tables.table import open_table

OPTIONS = [
    "source.scenes=8",
    "source.scenes_per_shard=8",
    "latents.images.min_side=8",
    "latents.rows_per_unit=4",
    "targets.draws=2",
    "targets.cfg_probability=0.5",
]


def options(teacher: str, out: str) -> list[str]:
    return ["--out", out, *set_options([f"model={teacher}", f"distill.teacher={teacher}", *OPTIONS])]


@pytest.fixture(scope="module")
def made(tiny_teacher, tmp_path_factory):
    """A run with LATENTS and TARGETS, made without Ray."""
    out = str(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        for job in (encode_latents, compute_targets):
            patch.setattr(job, "runner", lambda *_, **__: in_process)
        for job in (render_scenes, encode_latents, compute_targets):
            assert job.main(options(tiny_teacher, out)) == 0
    return out


def test_every_latent_has_its_targets(made):
    table = open_table(f"{made}/targets", kind="targets")
    assert (table.num_rows, len(table.units)) == (16, 4)
    rows = table.read(["id", "w"])
    assert rows["w"].null_count == 8
    assert len(set(rows["id"].to_pylist())) == 16


def test_units_state_the_version_of_latents(made):
    latents = open_table(f"{made}/latents")
    for record in open_table(f"{made}/targets").unit_records():
        assert f'"version": {latents.version}' in record.made_by


def test_the_table_is_verified_from_its_latents(made, tiny_teacher, capsys):
    arguments = options(tiny_teacher, made)[2:]
    assert verify_table.main([*arguments, "--set", "verification.units=4", f"{made}/targets"]) == 0
    assert "4 units recomputed, 4 of them bit for bit" in capsys.readouterr().out


def test_another_grid_is_refused(made, tiny_teacher, capsys):
    assert compute_targets.main([*options(tiny_teacher, made), "--set", "targets.teaching.k=4"]) == 2
    assert "teaching.k is 2 there, 4 here; give a new table" in capsys.readouterr().err


def test_a_dry_run_shows_steps_and_guidance(capsys, tmp_path):
    assert compute_targets.main(["--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "of 8 steps of mini-v for 4, 50% of them guided at 1.0 to 6.0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_table_is_what_its_student_reads(name):
    recipe = recipe_named(name)
    taught, learnt = recipe.targets.teaching.to_values(), recipe.distill.steps.to_values()
    shared = ("student_steps", "k", "cfg_range", "caption_dropout")
    assert {name: taught[name] for name in shared} == {name: learnt[name] for name in shared}
    assert recipe.targets.cfg_probability == recipe.distill.steps.cfg_probability


GRIDS = {"sd15": (16, 2, 2.0, 14.0, 0.1), "mini": (4, 2, 1.0, 6.0, 0.5)}


@pytest.mark.parametrize("name", GRIDS)
def test_the_recipes_have_the_papers_grids_and_ranges(name):
    targets = recipe_named(name).targets
    teaching, w = targets.teaching, targets.teaching.cfg_range
    assert (teaching.student_steps, teaching.k, w.low, w.high, targets.cfg_probability) == GRIDS[name]
