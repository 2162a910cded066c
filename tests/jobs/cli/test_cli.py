"""The command line: four options, one line for a mistake, nothing half-written."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from set_options import set_options

from jobs import command, encode_latents, generate_pairs, render_scenes, run_pipeline
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.recipes.verbs import pipeline_verbs
from jobs.runtime.exit_codes import run_guarded
from jobs.runtime.progress import format_duration, format_progress
from pipelines.ray_data.execution import CrashedTooOften
from pipelines.storage.objects import StorageError
from pipelines.tables.committer import CommitProgress
from snapfusion.settings import Settings


def error_line(capsys) -> str:
    """The one line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("render_scenes --recipe giant", "^render_scenes: --recipe giant: "),
        ("render_scenes --set pairs.steps=4", "^render_scenes: --set pairs.steps: "),
        ("render_scenes --set pairs.generation.steps=many", "^render_scenes: --set pairs.generation.steps: "),
        ("render_scenes --set pairs.generation.steps=0", "^render_scenes: --set pairs.generation.steps: "),
        ("render_scenes --set pairs.draws=1.5", "^render_scenes: --set pairs.draws: "),
        ("render_scenes --set pairs", "^render_scenes: --set 'pairs' "),
        ("render_scenes --out /dev/null/run", "^render_scenes: --out /dev/null/run/settings/"),
        # Settings by their earlier names.
        ("render_scenes --set plan=direct", "set schedule"),
        ("render_scenes --set allowance.rows=3", "set quota.rows"),
        ("render_scenes --set distill.watch.every=2", "set distill.validation.every"),
        ("render_scenes --recipe twin", "mini-efficient"),
        ("generate red --steps 0", "^generate: Invalid value for '--steps': 0 is not in the range x>=1"),
        ("generate red --steps 1001", "^generate: --steps 1001: .*1 .. 1000 is accepted"),
        ("generate red --steps many", "^generate: Invalid value for '--steps': 'many'"),
        ("generate red --guidance 0.5", "^generate: --guidance 0.5: 1.0 and more "),
        ("generate red --guidance nan", "^generate: --guidance nan: 1.0 and more "),
        ("generate red --guidance inf", "^generate: --guidance inf: 1.0 and more "),
        ("generate red --caption-column x", "^generate: --caption-column x: only --prompts FILE has "),
        ("generate red -n 0", "^generate: Invalid value for '-n': 0 is not in the range x>=1"),
        (
            "generate red --sampler heun",
            "^generate: Invalid value for '--sampler': 'heun' is not ",
        ),
        ("generate red --model /nowhere", "^generate: --model /nowhere: "),
        ("generate", "^generate: give a CAPTION or --prompts FILE"),
        ("generate red --prompts a.txt", "^generate: give a CAPTION or --prompts FILE"),
        ("generate --prompts /nowhere.txt", "^generate: .*/nowhere.txt"),
        ("generate red --seeds 1,b", "^generate: --seeds 1,b: whole numbers"),
        ("generate red --out a.gif", "^generate: --out a.gif: a file that ends with .png"),
        ("generate red --strength 0.5", "^generate: --strength 0.5: it has an effect with --image only"),
        ("generate red --image /nowhere.png", "^generate: --image /nowhere.png: No such file"),
        ("generate red --device abacus", "^generate: --device abacus: "),
        ("generate red --guidance 1 --negative blue", "^generate: --negative 'blue': this model takes none"),
        ("generate red --bundle b --image a.png", "^generate: --image a.png: a --bundle has its own"),
        ("generate red --out /dev/null/x.png --steps 1", "^generate: --out /dev/null/x.png: "),
    ],
)
def test_a_mistake_names_its_option(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words.split()) == 2
    assert re.search(message, error_line(capsys))
    assert list(tmp_path.iterdir()) == []


WITHOUT_RECIPE = {
    *("train_mini", "measure_mini", "measure_robustness"),
    *("check", "generate", "verify_bundle", "benchmark", "recipes", "export", "publish", "serve"),
}
SHARED = {"--recipe", "--config", "--set", "--out", "--dry-run", "--verbose", "--log-json", "--help"}
OWN = {
    "compact": {"--name"},
    "export_table": {"--to", "--folder"},
    "measure_latency": {"--export", "--whole", "--import"},
    "forget": {"--url", "--hash", "--id", "--erase", "--erase-pinned"},
    "vacuum": {"--delete"},
    "verify_table": {"--repair"},
    **{verb: {"--follow"} for verb in ("finetune_vpred", "train_efficient", "train_robust")},
}
TARGETS = {
    "compact": ["run/latents"],
    "export_table": ["run/latents", "--to", "webdataset"],
    "top_up": ["encode_latents"],
    "verify_table": ["run/latents"],
}
"""What the jobs need besides options."""


@pytest.mark.parametrize("verb", sorted({*command.VERBS} - WITHOUT_RECIPE))
def test_every_job_has_the_same_options(verb, capsys):
    assert command.main([verb.replace("_", "-"), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: snapfusion {verb.replace('_', '-')} ")
    options = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
    assert options == SHARED | OWN.get(verb, set())


@pytest.mark.parametrize("job", [render_scenes, encode_latents, generate_pairs, run_pipeline])
def test_a_dry_run_writes_nothing(job, capsys, tmp_path):
    out = tmp_path / "run"
    assert job.main(["--dry-run", "--out", str(out), "--set", "source.seed=5"]) == 0
    text = capsys.readouterr().out
    assert "source.seed = 5" in text
    assert "source.name" not in text, "only what differs from the recipe"
    assert "would " in text
    assert not out.exists()


def test_pipeline_steps_follow_the_recipe():
    def verbs(name, *settings):
        return pipeline_verbs(recipe_named(name).with_values(settings))

    for name in ("mini", "sd15", "sd2", "own"):
        assert verbs(name) == [verb for verb in run_pipeline.STEPS if verb in verbs(name)]
    assert set(verbs("mini", "deduplication.use=true")) - set(verbs("mini")) == {"find_duplicates"}
    students = {"measure_latency", "train_efficient", "distill_steps"}
    assert verbs("mini", "distill.teacher=null") == [verb for verb in verbs("mini") if verb not in students]
    assert students & set(verbs("mini", "distill.student=null")) == {"distill_steps"}
    # Its shards exist, and its students are those of its schedule.
    assert not {"render_scenes", "distill_steps"} & set(verbs("sd15"))
    assert {"distill_schedule", "evaluate"} <= set(verbs("sd15"))
    assert "compute_targets" in verbs("mini", "distill.targets=table")


def test_settings_are_saved_under_their_hash(capsys, tmp_path):
    settings = ["source.scenes=4", "source.scenes_per_shard=2"]
    recipe = recipe_named("mini").with_values(settings)
    assert render_scenes.main(["--out", str(tmp_path), *set_options(settings)]) == 0
    saved = tmp_path / "settings" / f"{recipe.digest()[:16]}.json"
    assert json.loads(saved.read_text()) == recipe.to_values()
    text = capsys.readouterr().out
    assert recipe.digest()[:16] in text
    assert "  source.scenes = 4\n  source.scenes_per_shard = 2\n" in text
    assert "source.seed" not in text, "only what differs from the recipe"
    assert render_scenes.main(["--out", str(tmp_path), "--verbose", "--dry-run"]) == 0
    assert "  source.seed = 0\n" in capsys.readouterr().out
    assert f"\nnext: snapfusion encode-latents --recipe mini --out {tmp_path}\n" in text
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    recipe = recipe_named(name)
    assert type(recipe).parse(recipe.to_values()) == recipe
    assert isinstance(recipe, Settings)


def caused(error: Exception, *, by: Exception) -> Exception:
    error.__cause__ = by
    return error


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("given x; y is accepted"), 2),
        (CrashedTooOften("three times"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 1),
        (
            caused(
                StorageError("file cannot be written"), by=OSError("No space left on device (os error 28)")
            ),
            1,
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "file"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "file"), 2),
        (ConnectionResetError("the store is gone"), 1),
        (ValueError("two\nlines"), 2),
        (ValueError(), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_mistakes_and_failures(error, code, capsys):
    assert run_guarded("verb", raising(error)) == code
    assert error_line(capsys).startswith("verb: ")


def test_exit_process_flushes_and_returns_its_code():
    script = "from jobs.runtime.exit_codes import exit_process; print('output'); exit_process(3)"
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "output\n")


def test_a_workers_error_is_printed_without_rays_wrappers(capsys):
    error = RuntimeError("a layer of Ray")
    error.__cause__ = ValueError("the cause")
    assert run_guarded("verb", raising(error)) == 2
    assert error_line(capsys) == "verb: the cause"


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_guarded("verb", raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate_pairs", "--out", "{out}"], "latents holds no table"),
        (["compute_targets", "--out", "{out}"], "latents holds no table"),
        (["encode_latents", "--out", "{out}"], "no shards at"),
        (["verify_table", "{out}/pairs"], "holds no table"),
    ],
)
def test_a_missing_input_is_named(words, message, capsys, tmp_path):
    assert command.main([word.format(out=tmp_path) for word in words]) == 2
    assert message in error_line(capsys)


def test_generate_writes_an_image(tiny_teacher, capsys, tmp_path):
    path = tmp_path / "deep" / "image.png"
    options = ["--model", tiny_teacher, "--steps", "2", "--seed", "1", "--out", str(path)]
    assert command.main(["generate", "a red thing", "-n", "2", "--sheet", *options]) == 0
    first = np.asarray(Image.open(path))
    assert first.shape == (256, 512, 3)
    assert "2 of 16 px, shown 16 times larger" in capsys.readouterr().out
    command.main(["generate", "a red thing", "-n", "2", "--sheet", *options])
    np.testing.assert_array_equal(np.asarray(Image.open(path.with_name("image-1.png"))), first)


def test_generate_says_what_it_does_not_read_or_know(capsys, tmp_path):
    path = str(tmp_path / "image.png")
    assert command.main(["generate", "a", "red", *["thing"] * 90, "--steps", "1", "--out", path]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^the caption has \d+ tokens, and only the first \d+ are read$", printed, re.MULTILINE)
    assert "the miniature does not know the caption 'a red thing thing" in printed
    known = ["a", "large", "red", "circle", "at", "the", "top", "on", "a", "white", "background"]
    assert command.main(["generate", *known, "--steps", "1", "--out", path]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "image-1.png"))


def test_the_command_runs_any_job(capsys, tmp_path):
    assert command.main(["run-pipeline", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "\ncompile_mobile   would compile" in capsys.readouterr().out


def test_progress_as_text():
    progress = CommitProgress(rows=60, total=120, rejected=2, units=3, first_rows=20, steady_seconds=4.0)
    assert format_progress(progress) == "60/120 rows, 10.0 rows/s, 6 s left, 2 rejected"
    unknown = CommitProgress(rows=20, total=None, rejected=0, units=1, first_rows=20, steady_seconds=0.0)
    assert format_progress(unknown) == "20 rows"
    assert [format_duration(seconds) for seconds in (5.4, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "../a", "", "a" * 101, "a b", "ä"])
def test_a_name_in_the_run_is_no_path(name, capsys, tmp_path):
    for setting in (
        "source.table",
        "distill.name",
        "download.folder",
        "deduplication.table",
        "captions.name",
    ):
        words = ["--out", str(tmp_path / "run"), "--set", f"{setting}={name}"]
        assert render_scenes.main(words) == 2
        assert error_line(capsys).startswith(f"render_scenes: --set {setting}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run[1]", "100%41", "run#1", "run?", "run*"])
@pytest.mark.parametrize("verb", sorted({*command.VERBS} - WITHOUT_RECIPE))
def test_a_folder_that_can_hold_no_table_is_refused(verb, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = TARGETS.get(verb, [])
    for parent in (str(tmp_path), "s3://bucket"):
        assert command.main([verb.replace("_", "-"), *target, "--out", f"{parent}/{name}"]) == 2
        assert error_line(capsys).startswith(f"{verb}: --out {parent}/{name}: tables can have no ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "ä漢", "{x}", "a+b,c;d"])
def test_a_run_is_in_the_folder_of_its_name(name, tmp_path):
    out, settings = str(tmp_path / name), set_options(["source.scenes=4", "source.scenes_per_shard=2"])
    assert render_scenes.main(["--out", out, *settings]) == 0
    for job in (encode_latents, run_pipeline):
        assert job.main(["--dry-run", "--out", out, *settings]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["settings", "shards"]


def test_jobs_read_a_run_in_a_folder_of_any_letters(whole_run, capsys, tmp_path):
    run = whole_run.copy(tmp_path / "a b ä漢{x}")
    request = tmp_path / "ids[1]"
    request.write_text("web/00000/0000001\n")
    options = ["--out", str(run.out), "--set", f"model={run.teacher}"]
    assert command.main(["verify-table", f"{run.out}/pairs", *options, "--set", "verification.units=1"]) == 0
    assert command.main(["vacuum", *options]) == 0
    assert command.main(["forget", "--dry-run", "--id", str(request), *options]) == 0
    assert "would delete 1 rows and 0 rejections from latents" in capsys.readouterr().out


def test_a_model_and_an_image_have_literal_names(tiny_teacher, capsys, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "m[1]")
    for model, code in ((tmp_path / "m[1]", 0), (tmp_path / "m1", 2)):
        words = ["red", "--model", str(model), "--steps", "1", "--out", str(tmp_path / "image[1].png")]
        assert command.main(["generate", *words]) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image[1].png", "m[1]"]
