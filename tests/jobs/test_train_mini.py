import json
import re

import pytest
from set_options import set_options

from jobs import measure_mini, train_mini

STAGES = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser", "velocity")
NOISY = ("noisy_denoiser", "noisy_velocity")
TINY = set_options(
    [
        "scenes=12",
        *(f"{name}.{setting}" for name in (*STAGES, *NOISY) for setting in ("samples=12", "batch=6")),
    ]
)
FEW = set_options(["scenes=200", 'models=["sd-v"]', "steps=[1,2]", "guidance=[2.0]"])

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.mark.slow
def test_a_short_run_writes_weights_and_report(tmp_path, capsys):
    assert train_mini.main(["--out", str(tmp_path), *TINY]) == 0
    assert "denoiser: step 2/2" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "weights" / "manifest.json").read_text())
    assert manifest["recipe"]["scenes"] == 12

    page = (tmp_path / "report.html").read_text()
    assert "UNet, v" in page
    assert (page.count("<svg"), page.count("<img")) == (len(STAGES) + len(NOISY), 32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The bundled models, in a few images, and where their figures are."""
    out = tmp_path_factory.mktemp("measured") / "figures.json"
    assert measure_mini.main(["--out", str(out), *FEW]) == 0
    return out


@pytest.mark.slow
def test_figures_are_kept_with_intervals_and_shown(measured):
    results = json.loads(measured.read_text())
    parts = {"vae", "scorer", "oracle", "floor", "sd-v blocks", "sd-v ddim 1 w=2", "sd-v ddim 2 w=2"}
    assert set(results["figures"]) == parts
    for part in parts:
        for value, low, high in results["figures"][part].values():
            assert low <= value <= high
    assert set(results["figures"]["sd-v ddim 1 w=2"]) >= {"all", "clip", "fid", "shape"}
    page = measured.with_suffix(".html").read_text()
    assert "sd-v ddim 2 w=2" in page
    assert "one_attribute" in page


@pytest.mark.slow
def test_a_second_measurement_adds_what_is_missing(measured, capsys):
    before = json.loads(measured.read_text())["figures"]
    assert measure_mini.main(["--out", str(measured), *FEW, "--set", 'solvers=["ddim","dpm++"]']) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert {part for line in printed for part in json.loads(line)} == {"sd-v dpm++ 1 w=2", "sd-v dpm++ 2 w=2"}
    after = json.loads(measured.read_text())["figures"]
    assert {part: after[part] for part in before} == before


@pytest.mark.slow
def test_results_of_other_scenes_are_refused(measured, capsys):
    assert measure_mini.main(["--out", str(measured), *FEW, "--set", "seed=1"]) == 2
    assert "name another" in capsys.readouterr().err


def test_dry_run_shows_the_settings_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert train_mini.main(["--out", str(out), "--dry-run", "--set", "seed=7"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "samples=3"], "'samples'"),
        (["--set", "denoiser.batch=0"], "denoiser.batch: .* greater than 0"),
        (["--set", "seed=x"], "seed: .* integer"),
        (["--device", "cuda:77"], "--device: 'cuda:77'"),
        (["--device", "nonsense"], "--device: 'nonsense'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, words):
    assert train_mini.main(["--out", str(tmp_path / "run"), *options]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert re.search(words, printed)
    assert not (tmp_path / "run").exists()


def test_a_malformed_results_file_is_named(tmp_path, capsys):
    path = tmp_path / "figures.json"
    path.write_text('{"x')
    assert measure_mini.main(["--out", str(path), *FEW]) == 2
    assert f"--out: {path} is no file of results" in capsys.readouterr().err
    assert path.read_text() == '{"x'


def test_missing_weights_are_one_line(tmp_path, capsys):
    assert measure_mini.main(["--weights", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
