"""Tests of the comparison of a robust with a plain miniature."""

import json
import shutil

import pytest
from PIL import Image

from jobs import measure_robustness
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights

FEW = ["--set", "scenes=50", "--set", "seeds=[0]", "--set", "steps=1"]


pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A copy of the bundled model, by a path of this machine."""
    return shutil.copytree(BUNDLED["mini-v"], tmp_path_factory.mktemp("models") / "copy")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, elsewhere):
    folder = tmp_path_factory.mktemp("measured")
    assert measure_robustness.main([str(elsewhere), "mini-v", "--out", str(folder), *FEW]) == 0
    return folder


def test_a_model_compared_with_itself_loses_the_same(measured):
    summary = json.loads((measured / "robustness.json").read_text())["summary"]
    for figure in ("attributes", "detail"):
        lost = summary[figure]["lost_on_average"]
        assert lost["plain"] == lost["robust"]
        assert lost["plain"][0] > 0
        assert lost["ratio"] in (None, [1, 1, 1])
        assert summary[figure]["lost_on_average_by_seed"]["0"] == lost
        assert len(summary[figure]["lost"]) == 6
    assert summary["detail"]["lost"]["resnet up"]["ratio"] == [1, 1, 1]


def test_files_have_hashes_and_no_paths(measured, elsewhere):
    text = (measured / "robustness.json").read_text()
    record = json.loads(text)
    fingerprint = load("mini-v").fingerprint()
    assert record["identity"]["models"] == {"plain": fingerprint, "robust": fingerprint}
    assert record["models"] == {"plain": f"UNet {fingerprint['unet'][:12]}", "robust": "mini-v"}
    page = (measured / "robustness.html").read_text()
    for shown in (text, page):
        assert str(elsewhere.parent) not in shown
        assert str(measured) not in shown


def test_images_of_both_models_and_all_groups(measured):
    with Image.open(measured / "robustness.png") as sheet:
        assert sheet.width > 8 * 96
    page = (measured / "robustness.html").read_text()
    assert page.count("<img") == 2 * 3 * 2 * 8  # figures, scenes, models, columns
    for words in ("attention middle", "mean over groups", "seed 0", "t = 249"):
        assert words in page


def test_a_second_run_measures_nothing(measured, capsys):
    names = ("robustness.json", "robustness.html", "robustness.png")
    before = {name: (measured / name).read_bytes() for name in names}
    # From another path, which is no part of the identity.
    assert measure_robustness.main(["mini-v", "mini-v", "--out", str(measured), *FEW]) == 0
    printed = capsys.readouterr().out
    assert "parts" not in printed
    assert "mean over groups" in printed
    after = json.loads((measured / "robustness.json").read_text())
    assert after["figures"] == json.loads(before["robustness.json"])["figures"]
    assert (measured / "robustness.png").read_bytes() == before["robustness.png"]


@pytest.mark.slow
def test_a_stopped_run_resumes(measured, tmp_path, capsys):
    record = json.loads((measured / "robustness.json").read_text())
    whole = dict(record["figures"])
    del record["figures"]["robust 0 resnet up"], record["summary"], record["models"]
    (tmp_path / "robustness.json").write_text(json.dumps(record))
    assert measure_robustness.main(["mini-v", "mini-v", "--out", str(tmp_path), *FEW]) == 0
    assert capsys.readouterr().out.count("14 of 14 parts") == 1
    assert json.loads((tmp_path / "robustness.json").read_text())["figures"] == whole


def test_results_of_other_settings_are_refused(measured, capsys):
    refused = ["mini-v", "mini-v", "--out", str(measured), *FEW, "--set", "steps=2"]
    assert measure_robustness.main(refused) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "settings.steps is 1 there, 2 here" in printed


def refused(arguments, tmp_path, capsys) -> str:
    out = tmp_path / "run"
    assert measure_robustness.main([*arguments, "--out", str(out)]) == 2
    assert not out.exists()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini-v", "mini-w"], "there is no model folder or file 'mini-w'"),
        (["mini-v", "mini-v", "--set", "scenes=60"], "multiple of 25"),
        (["mini-v", "mini-v", "--set", "pictures=5"], "no setting 'pictures'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, arguments, words):
    assert words in refused(arguments, tmp_path, capsys)


def test_a_model_of_other_blocks_is_refused(tmp_path, capsys):
    bundle = load("mini-v")
    unet = build_unet(architecture_of(bundle.unet).without("mid_block.attentions.0"))
    inherit_weights(unet, bundle.unet)
    bundle.unet = unet
    save(bundle, tmp_path / "evolved")
    printed = refused(["mini-v", str(tmp_path / "evolved")], tmp_path, capsys)
    assert "plain has the block mid_block.attentions.0, robust has not" in printed
