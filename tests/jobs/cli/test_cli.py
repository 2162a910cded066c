"""The command line: four options, one line for a mistake, nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from set_options import set_options

from jobs import command, encode_latents, generate_pairs, render_scenes, run_pipeline, verify_table
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.verbs import pipeline_verbs
from jobs.runtime.exit_codes import run_guarded
from jobs.runtime.progress import StatusLine, format_duration, format_progress
from pipelines.ray_data.execution import CrashedTooOften
from pipelines.tables.committer import CommitProgress
from snapfusion.settings import Settings


def error_line(capsys) -> str:
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--recipe", "giant"], "--recipe giant: "),
        (["--set", "pairs.steps=4"], "--set pairs.steps: "),
        (["--set", "pairs.generation.steps=many"], "--set pairs.generation.steps: "),
        (["--set", "pairs.generation.steps=0"], "--set pairs.generation.steps: "),
        (["--set", "pairs.draws=1.5"], "--set pairs.draws: "),
        (["--set", "pairs"], "--set 'pairs' "),
        (["--out", "/dev/null/run"], "--out /dev/null/run/settings/"),
    ],
)
def test_a_mistake_names_its_option(options, line, capsys, tmp_path):
    arguments = options if "--out" in options else [*options, "--out", str(tmp_path / "run")]
    assert render_scenes.main(arguments) == 2
    assert error_line(capsys).startswith(f"render_scenes: {line}")
    assert not (tmp_path / "run").exists()


WITHOUT_RECIPE = (
    "train_mini",
    "measure_mini",
    "measure_robustness",
    "generate",
    "verify_bundle",
    "benchmark",
)
OWN = {"forget": {"--url", "--hash", "--id", "--erase", "--erase-pinned"}, "vacuum": {"--delete"}}


def test_every_job_has_the_same_options(capsys):
    for verb in command.VERBS:
        if verb in WITHOUT_RECIPE:
            continue
        module = __import__(f"jobs.{verb}", fromlist=["main"])
        with pytest.raises(SystemExit):
            module.main(["--help"])
        options = {
            word.strip("[],") for word in capsys.readouterr().out.split() if word.startswith(("--", "[--"))
        }
        assert options - {"--help"} == {"--recipe", "--set", "--out", "--dry-run"} | OWN.get(verb, set()), (
            verb
        )


@pytest.mark.parametrize("job", [render_scenes, encode_latents, generate_pairs, run_pipeline])
def test_a_dry_run_writes_nothing(job, capsys, tmp_path):
    out = tmp_path / "run"
    assert job.main(["--dry-run", "--out", str(out), "--set", "source.seed=5"]) == 0
    text = capsys.readouterr().out
    assert '"seed": 5' in text
    assert "would " in text
    assert not out.exists()


def test_pipeline_steps_follow_the_recipe():
    def verbs(name, *settings):
        return pipeline_verbs(recipe_named(name).with_values(settings))

    assert verbs("mini", "deduplication.use=true") == list(run_pipeline.STEPS)
    assert set(verbs("mini", "deduplication.use=true")) - set(verbs("mini")) == {"find_duplicates"}
    students = {"measure_latency", "train_efficient", "distill_steps"}
    assert verbs("mini", "distill.teacher=null") == [verb for verb in verbs("mini") if verb not in students]
    assert students & set(verbs("mini", "distill.student=null")) == {"distill_steps"}
    # Its shards exist, and its students are distilled by `jobs.distill_schedule`.
    assert not {"render_scenes", "distill_steps"} & set(verbs("sd15"))


def test_settings_are_saved_under_their_hash(capsys, tmp_path):
    settings = ["source.scenes=4", "source.scenes_per_shard=2"]
    recipe = recipe_named("mini").with_values(settings)
    assert render_scenes.main(["--out", str(tmp_path), *set_options(settings)]) == 0
    saved = tmp_path / "settings" / f"{recipe.digest()[:16]}.json"
    assert json.loads(saved.read_text()) == recipe.to_values()
    text = capsys.readouterr().out
    assert recipe.digest()[:16] in text
    assert "source.scenes = 4" in text
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    recipe = recipe_named(name)
    assert type(recipe).parse(recipe.to_values()) == recipe
    assert isinstance(recipe, Settings)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("given x; y is accepted"), 2),
        (CrashedTooOften("three times"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_mistakes_and_failures(error, code, capsys):
    def work() -> None:
        raise error

    assert run_guarded("verb", work) == code
    assert error_line(capsys).startswith("verb: ")


def test_exit_process_flushes_and_returns_its_code():
    script = "from jobs.runtime.exit_codes import exit_process; print('output'); exit_process(3)"
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "output\n")


def test_a_workers_error_is_printed_without_rays_wrappers(capsys):
    def work() -> None:
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise RuntimeError("a layer of Ray") from cause

    assert run_guarded("verb", work) == 2
    assert error_line(capsys) == "verb: the cause"


def test_a_fault_of_the_program_is_not_hidden():
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_guarded("verb", work)


def test_a_missing_input_is_named(capsys, tmp_path):
    assert generate_pairs.main(["--out", str(tmp_path)]) == 2
    assert "latents holds no table" in error_line(capsys)
    assert encode_latents.main(["--out", str(tmp_path)]) == 2
    assert "no shards at" in error_line(capsys)
    assert verify_table.main([str(tmp_path / "pairs")]) == 2
    assert "holds no table" in error_line(capsys)


def test_generate_writes_an_image(tiny_teacher, capsys, tmp_path):
    path = tmp_path / "deep" / "image.png"
    options = ["--model", tiny_teacher, "--steps", "2", "--seed", "1", "--out", str(path)]
    assert command.main(["generate", "a red thing", "-n", "2", *options]) == 0
    first = np.asarray(Image.open(path))
    assert first.shape == (256, 512, 3)
    assert "2 of 16 px, shown 16 times larger" in capsys.readouterr().out
    command.main(["generate", "a red thing", "-n", "2", *options])
    np.testing.assert_array_equal(np.asarray(Image.open(path)), first)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--steps", "0"], "snapfusion: --steps 0: at least 1 is accepted"),
        (["--steps", "1001"], "snapfusion: --steps 1001: 1 to 1000 is accepted by this model"),
        (["--steps", "many"], "snapfusion: --steps: invalid int value: 'many'"),
        (["--guidance", "0.5"], "snapfusion: --guidance 0.5: 1.0 and more is accepted"),
        (["--guidance", "nan"], "snapfusion: --guidance nan: 1.0 and more is accepted"),
        (["--guidance", "inf"], "snapfusion: --guidance inf: 1.0 and more is accepted"),
        (["-n", "0"], "snapfusion: -n 0: at least 1 is accepted"),
        (["--sampler", "heun"], "snapfusion: --sampler: invalid choice: 'heun'"),
        (["--model", "/nowhere"], "snapfusion: --model /nowhere: there is no model folder"),
        (["--out", "/dev/null/x.png", "--steps", "1"], "snapfusion: --out /dev/null/x.png: "),
    ],
)
def test_generate_refuses_unusable_options(options, line, capsys):
    assert command.main(["generate", "a caption", *options]) == 2
    assert error_line(capsys).startswith(line)


def test_the_command_runs_any_job(capsys, tmp_path):
    assert command.main(["run-pipeline", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "compile_mobile: would compile" in capsys.readouterr().out


def test_progress_as_text():
    progress = CommitProgress(rows=60, total=120, rejected=2, units=3, first_rows=20, steady_seconds=4.0)
    assert format_progress(progress) == "60/120 rows, 10.0 rows/s, 6 s left, 2 rejected"
    unknown = CommitProgress(rows=20, total=None, rejected=0, units=1, first_rows=20, steady_seconds=0.0)
    assert format_progress(unknown) == "20 rows"
    assert [format_duration(seconds) for seconds in (5.4, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_status_line_on_and_off_a_terminal(on_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: on_terminal
    line = StatusLine(stream)
    for step in range(5):
        line.show(f"step {step}", last=step == 4)
    written = stream.getvalue()
    assert written.endswith("step 4\n")
    assert written.count("\n") == (1 if on_terminal else 2)
    assert written.count("\r") == (5 if on_terminal else 0)


def test_the_verbs_of_the_command_are_the_jobs():
    files = Path(command.__file__).parent.glob("*.py")
    assert {*command.VERBS, "command"} == {file.stem for file in files if "def main(" in file.read_text()}


@pytest.mark.parametrize(
    ("options", "new"),
    [
        (["--set", "plan=direct"], "set schedule"),
        (["--set", "allowance.rows=3"], "set quota.rows"),
        (["--set", "distill.watch.every=2"], "set distill.validation.every"),
        (["--recipe", "twin"], "mini-efficient"),
    ],
)
def test_renamed_settings_are_refused_with_the_new_name(options, new, capsys, tmp_path):
    assert render_scenes.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert new in error_line(capsys)
