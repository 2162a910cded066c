"""The licence in a model card is that of the models it was made from, or is called unstated."""

import json

import pytest

from jobs import run_pipeline
from jobs.cli.in_run import base_model_of
from jobs.cli.job import Job
from jobs.cli.licences import licence_of
from jobs.recipes.registry import recipe_named
from snapfusion.export.settings import Licence

MINIATURE = recipe_named("mini").mobile.licence
SD15 = recipe_named("sd15").model


def job_of(name="mini", *, out="runs/x", assigned=(), **licence):
    recipe = recipe_named(name).with_values(
        [f"mobile.licence.{key}={value}" for key, value in licence.items()]
    )
    keys = {f"mobile.licence.{key}" for key in licence} | set(assigned)
    return Job(verb="compile_mobile", recipe=recipe, out=out, assigned=frozenset(keys))


@pytest.mark.parametrize(
    "sources",
    [("mini",), ("mini-v", "mini"), ("runs/x/student/model",), ("mini", "runs/x/efficient-first"), ()],
)
def test_the_recipes_licence_is_of_its_model_and_the_run(sources):
    assert licence_of(job_of(), *sources) == MINIATURE


@pytest.mark.parametrize(
    "source", ["models/mine", SD15, "tune.safetensors?lora=a.safetensors", "runs/xy/model"]
)
def test_the_recipes_licence_is_not_another_models(source):
    assert licence_of(job_of(), "mini", source) == Licence()
    assert base_model_of(job_of(), source).licence is None


def test_a_model_of_the_run_has_its_teachers_licence(tmp_path):
    job = job_of(out=str(tmp_path))
    (tmp_path / "metrics.json").write_text('{"recipe": "mini"}')  # of the report
    parents = {
        "efficient": {"model": "mini-v"},
        "student": {"teacher": "mini-v", "student": "OUT/efficient/model"},
        "decoder": {"teacher": "mini"},
    }

    def licence_from(**changes):
        for name, roles in parents.items():
            record = {
                "latents": {"identity": "of a table"},
                **{
                    role: {"source": source.replace("OUT", job.out)}
                    for role, source in (roles | changes).items()
                },
            }
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.json").write_text(json.dumps({"parents": record}))
        return licence_of(job, f"{job.out}/student/model", f"{job.out}/decoder")

    assert licence_from() == MINIATURE
    assert licence_of(job, f"{job.out}/untrained") == MINIATURE
    assert licence_from(teacher="models/mine") == Licence()
    assert licence_from(model="models/mine") == Licence()


def test_a_licence_that_is_assigned_holds_for_any_model():
    assert licence_of(job_of(weights="MIT"), "models/mine") == Licence(weights="MIT")
    whole = job_of(assigned=["mobile.licence"])
    assert licence_of(whole, "models/mine") == MINIATURE


def test_an_absolute_path_of_the_run_is_in_the_run(tmp_path, monkeypatch):
    (tmp_path / "runs/x/student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert licence_of(job_of(), str(tmp_path / "runs/x/student")) == MINIATURE
    assert licence_of(job_of(out=str(tmp_path / "runs/x")), "runs/x/student") == MINIATURE


def test_a_pipeline_asks_for_licences_of_another_model(capsys, tmp_path):
    options = ["--dry-run", "--out", str(tmp_path), "--set", "mobile.model=models/mine"]
    assert run_pipeline.main(options) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert [line.split()[1] for line in missing] == ["mobile.licence.weights", "mobile.licence.data"]
    given = ["--set", "mobile.licence.weights=MIT", "--set", "mobile.licence.data=MIT"]
    assert run_pipeline.main([*options, *given]) == 0
    assert "missing" not in capsys.readouterr().out
