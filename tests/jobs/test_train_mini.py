import json

import pytest
import torch

from jobs import measure_mini, train_mini

STAGES = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser")
TINY = [
    argument for name in STAGES for argument in ("--set", f"{name}.samples=12", "--set", f"{name}.batch=6")
] + ["--set", "scenes=12"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_short_run_ends_in_weights_that_can_be_measured(tmp_path, capsys):
    assert train_mini.main(["--out", str(tmp_path), *TINY]) == 0
    out = capsys.readouterr().out
    assert "denoiser: step 2/2" in out
    weights = tmp_path / "weights"
    manifest = json.loads((weights / "manifest.json").read_text())
    assert manifest["recipe"]["scenes"] == 12

    few = ["--set", "scenes=100", "--set", "generated=2", "--set", "steps=1", "--set", "guidance=[2.0]"]
    assert measure_mini.main(["--weights", str(weights), *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {
        name: part for line in lines if line.startswith('{"') for name, part in json.loads(line).items()
    }
    assert set(figures) == {"vae", "scorer", "oracle", "teacher w=2"}
    assert figures["teacher w=2"]["n"] == 2


def test_dry_run_shows_the_settings_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert train_mini.main(["--out", str(out), "--dry-run", "--set", "seed=7"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7
    assert not out.exists()


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("samples=3", "no setting 'samples'"),
        ("denoiser.batch=0", "greater than 0"),
        ("seed=x", "valid integer"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(tmp_path, capsys, assignment, words):
    assert train_mini.main(["--out", str(tmp_path / "run"), "--set", assignment]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "run").exists()


def test_no_weights_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert measure_mini.main(["--weights", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
