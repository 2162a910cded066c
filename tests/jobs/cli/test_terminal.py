"""Output for people: help, mistakes and progress on a terminal, in a log, and through a pipe."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import command, render_scenes
from jobs.cli.groups import GROUPS
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.runtime import progress
from snapfusion.settings import flatten

ROOT = Path(__file__).parents[3]
STEPS = """
import time
from jobs.runtime.logs import logger
from jobs.runtime.progress import StatusLine, progress_display
with progress_display("training"):
    line = StatusLine()
    for step in range(5):
        line.show(f"step {step}", last=step == 4)
        time.sleep(0.15)
    logger.info("a line of text")
    time.sleep(2.5)
"""


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )


def on_a_terminal(*words: str, columns: int = 80) -> str:
    """Output of a command whose stdout is a terminal."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, *words], stdout=writer, stderr=writer, env=environment):
        os.close(writer)
        written = b""
        try:
            while chunk := os.read(reader, 4096):
                written += chunk
        except OSError:
            pass  # the other end of a terminal that is closed
    os.close(reader)
    return written.decode()


def test_progress_is_one_updating_line_on_a_terminal():
    text = on_a_terminal("-c", STEPS)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).strip() for part in re.split(r"[\r\n]+", text)]
    assert {"step 0", "step 2"} <= {line[2:] for line in lines}, "shown behind a spinner"
    assert lines.count("step 4") == 1, "the last one stays"
    assert "a line of text" in lines
    assert any(re.fullmatch(r". step 4 \([12] s\)", line) for line in lines), "the seconds of a silent step"


def test_progress_in_a_log_is_plain_lines():
    assert run("-c", STEPS).stdout == "  step 0\n  step 4\na line of text\n"


def test_a_long_step_is_not_silent_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1.0)
    with progress.progress_display("compile_mobile"):
        progress.doing("compiling unet")
        progress.time.sleep(2.5)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "  compiling unet"
    assert others
    assert all(re.fullmatch(r"  compiling unet: still at work, [12] s", line) for line in others)


def test_json_lines_for_collectors(capsys, tmp_path):
    words = ["--out", str(tmp_path), "--set", "source.scenes=2", "--log-json"]
    assert render_scenes.main(words) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {tuple(record) for record in records} == {("time", "level", "message")}
    assert records[-2]["message"] == f"2 scenes in {tmp_path}/shards"
    assert render_scenes.main(words[:-1]) == 0
    assert capsys.readouterr().out.startswith("render_scenes: ")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_terminal(columns):
    text = on_a_terminal("-m", "jobs.command", "--help", columns=columns)
    assert max(len(line) for line in text.splitlines()) <= columns
    assert all(verb in text for verbs in GROUPS.values() for verb in verbs)


def test_every_verb_is_in_one_group():
    entries = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "command"}
    grouped = [verb.replace("-", "_") for verbs in GROUPS.values() for verb in verbs]
    assert sorted(grouped) == sorted({*entries, "recipes"})
    for verb in grouped:
        assert command.load(verb).name == verb


def test_version_and_the_nearest_verb(capsys):
    assert command.main(["--version"]) == 0
    assert re.fullmatch(r"snapfusion [0-9.]+\n", capsys.readouterr().out)
    assert command.main(["generat", "red"]) == 2
    assert capsys.readouterr().err == "snapfusion: there is no verb generat; did you mean generate?\n"


def test_completion_of_verbs_and_options():
    for words, expected in (("snapfusion distil", "distill-steps"), ("snapfusion plan --dr", "--dry-run")):
        variables = {"_SNAPFUSION_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "1"}
        variables["COMP_CWORD"] = str(words.count(" "))
        assert f"plain,{expected}" in run("-m", "jobs.command", **variables).stdout


def test_a_closed_pipe_ends_a_command_quietly():
    piped = f"{sys.executable} -m jobs.command recipes sd15 | head -n 1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", f"for i in 1 2 3; do {piped}; done"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert ended.stderr == ""
    assert set(ended.stdout.splitlines()) <= {"name: sd15", "0", "141"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_is_a_config_file(name, capsys, tmp_path):
    assert command.main(["recipes", name]) == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(capsys.readouterr().out)
    assert yaml.safe_load(path.read_text()) == recipe_named(name).to_values()
    words = ["--recipe", name, "--config", str(path), "--dry-run", "--out", str(tmp_path / "run")]
    assert render_scenes.main(words) == 0
    assert recipe_named(name).digest()[:16] in capsys.readouterr().out


def test_settings_of_a_config_file_come_before_set(capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("source: {seed: 7, scenes: 3}\nvpred.loop.learning_rate: 1e-4\n")
    words = ["--config", str(path), "--set", "source.scenes=5", "--dry-run", "--verbose"]
    assert render_scenes.main(words) == 0
    shown = capsys.readouterr().out
    recipe = recipe_named("mini").with_values(
        ["source.seed=7", "source.scenes=5", "vpred.loop.learning_rate=1e-4"]
    )
    assert all(f"  {key} = {value}\n" in shown for key, value in flatten(recipe.to_values()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: {seeds: 1}", "source.seeds: source has no setting 'seeds'; it has blocklists"),
        ("source:\n  seed: 1\n  seed: 2", "the key seed stands there twice"),
        ("source.seed: 1\nsource: {seed: 2}", "the key source.seed stands there twice"),
        ("- source", "a mapping of settings is accepted"),
        ("1: 2", "the key 1 is no string"),
        ("source: [", "while parsing a flow node"),
        ("watch: {}\nplan: direct", "set schedule"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(text, message, capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert render_scenes.main(["--config", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("render_scenes: --config ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["", "/", "//"])
def test_an_empty_out_is_refused(out, capsys):
    assert render_scenes.main(["--out", out]) == 2
    assert capsys.readouterr().err == f"render_scenes: --out {out!r}: a folder or a URL is accepted\n"
