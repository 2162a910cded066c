"""Inputs that cannot be used are refused in one line with exit code 2, before anything is generated."""

import json
from pathlib import Path

import pytest
import torch
from coco_inputs import IDS, prompt_options, write_annotations, write_images
from in_process import in_process
from lpips_files import write_lpips
from safetensors.torch import save_file
from set_options import set_options

from jobs import evaluate as job
from pipelines.stages.sample import SampleAndScore

ONE = '{"name":"one","sampler":{"steps":1}}'
SMALL = ("guidance=[1.0]", "groups=2", "baseline=one", "floor_redraws=0", "kid_images=0")
OWN = ("prompts.limit=8", "prompts.draws=1", "references.count=8")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)


def evaluate(out, *assignments, contenders=ONE):
    settings = [*SMALL, f"contenders=[{contenders}]", *assignments]
    return job.main(["--out", str(out), *set_options(f"evaluation.{one}" for one in settings)])


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Evaluates, and returns the one line with which that was refused."""

    def generated(*_):
        raise AssertionError("nothing may be generated")

    def evaluate_refused(*assignments, contenders=ONE):
        monkeypatch.setattr(SampleAndScore, "__init__", generated)
        assert evaluate(tmp_path / "run", *assignments, contenders=contenders) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("evaluate: ")
        return line

    return evaluate_refused


def test_captions_without_any_image(refused, tmp_path):
    annotations = write_annotations(tmp_path, year=2017)
    (tmp_path / "empty").mkdir()
    line = refused(*prompt_options(annotations, tmp_path / "empty"))
    assert "none of the 8 captions" in line
    assert "there is no image" in line


def test_images_without_any_caption(refused, tmp_path):
    """Such as COCO's image_info_test2017.json."""
    annotations = tmp_path / "image_info_test2017.json"
    named = json.loads(Path(write_annotations(tmp_path, year=2017)).read_text())["images"]
    annotations.write_text(json.dumps({"images": named, "categories": []}))
    line = refused(*prompt_options(annotations, write_images(tmp_path, year=2017)))
    assert "COCO's object with a list of 'annotations'" in line
    annotations.write_text(json.dumps({"images": named, "annotations": []}))
    line = refused(*prompt_options(annotations, tmp_path / "val2017"))
    assert "has no captions" in line


def test_a_folder_that_is_not_there(refused, tmp_path):
    line = refused(*prompt_options(write_annotations(tmp_path, year=2014), tmp_path / "nowhere"))
    assert "nowhere" in line


def test_annotations_of_another_split(refused, tmp_path):
    annotations = write_annotations(tmp_path, year=2014)
    line = refused(*prompt_options(annotations, write_images(tmp_path, year=2017)))
    assert "give annotations and images of one split" in line


def test_some_without_the_other_are_counted(tmp_path, capsys):
    annotations = write_annotations(tmp_path, year=2014)
    images = write_images(tmp_path, year=2014, ids=[*IDS[:6], 1000, 1001])
    assert evaluate(tmp_path / "run", *prompt_options(annotations, images)) == 0
    printed = capsys.readouterr().out
    assert "captions: 2 have no image" in printed
    assert "images: 2 are not in the annotations" in printed
    # Said, not refused.
    assert "drawn: 6 feature vectors of 128 numbers" in printed
    assert "reference: 6 feature vectors of 128 numbers" in printed
    results = json.loads((tmp_path / "run/evaluation/results.json").read_text())
    assert results["protocol"]["captions"]["without_image"] == 2
    assert results["protocol"]["reference"]["without_caption"] == 2


def test_few_captions_with_an_image(refused, tmp_path):
    annotations = write_annotations(tmp_path, year=2014)
    line = refused(*prompt_options(annotations, write_images(tmp_path, year=2014, ids=IDS[:3])))
    assert "coco has 3 captions with their image, and 5 without; 4 are needed for 2 groups" in line


def test_features_of_another_network(refused, tmp_path, capsys):
    assert evaluate(tmp_path / "run", *OWN) == 0
    capsys.readouterr()
    save_file({"x": torch.zeros(1)}, tmp_path / "inception.safetensors")
    inception = f'{{"network":"inception","weights":"{tmp_path / "inception.safetensors"}"}}'
    line = refused(*OWN, f"samples.judging.features={inception}")
    assert "evaluation/references" in line
    assert "features.network" in line


def test_two_contenders_of_one_name(refused):
    line = refused(contenders=f"{ONE},{ONE}")
    assert "names of contenders repeat: one, one" in line


@pytest.mark.parametrize("missing", ["model", "decoder"])
def test_a_contender_without_its_model(refused, tmp_path, missing):
    other = f'{{"name":"other","{missing}":"{tmp_path}/none"}}'
    line = refused(*OWN, contenders=f"{ONE},{other}")
    assert line.startswith("evaluate: contender 'other': ")
    assert f"{tmp_path}/none" in line
    assert not (tmp_path / "run/evaluation").exists()


def scorer_settings(network, folder):
    weights = f'"weights":"{folder / network}.safetensors"'
    return {
        "inception": f'samples.judging.features={{"network":"inception",{weights}}}',
        "ViT-g-14": f'samples.judging.scorer={{"network":"ViT-g-14",{weights}}}',
        "pickscore": f'samples.judging.preferences=[{{"name":"pickscore",{weights}}}]',
        "hpsv2": f'samples.judging.preferences=[{{"name":"hpsv2",{weights}}}]',
    }[network]


@pytest.mark.parametrize("network", ["inception", "ViT-g-14", "pickscore", "hpsv2"])
def test_scores_without_weights(refused, tmp_path, network):
    line = refused(*OWN, scorer_settings(network, tmp_path))
    assert f"there is no file '{tmp_path / network}.safetensors'" in line
    assert not (tmp_path / "run/evaluation").exists()


def test_weights_that_are_pickled(refused, tmp_path):
    (tmp_path / "hpsv2.pt").write_bytes(b"")
    line = refused(
        *OWN, f'samples.judging.preferences=[{{"name":"hpsv2","weights":"{tmp_path / "hpsv2.pt"}"}}]'
    )
    assert "is not a .safetensors file" in line


@pytest.mark.parametrize("missing", ["backbone", "heads"])
def test_lpips_without_weights(refused, tmp_path, missing):
    files = write_lpips(tmp_path)
    line = refused(*OWN, *lpips_options(files | {missing: str(tmp_path / "none.safetensors")}))
    assert f"there is no file '{tmp_path / 'none.safetensors'}'" in line
    assert not (tmp_path / "run/evaluation").exists()


def lpips_options(files):
    return ("prompts.draws=2", "samples.drawing.images=true", f"lpips={json.dumps(files)}")


def test_lpips_without_images_or_draws(refused, tmp_path):
    lpips = f"lpips={json.dumps(write_lpips(tmp_path))}"
    for lacking in (("prompts.draws=2",), ("samples.drawing.images=true",)):
        assert "lpips compares images of the same caption" in refused(*OWN, lpips, *lacking)


def test_a_score_given_twice(refused, tmp_path):
    one = f'{{"name":"hpsv2","weights":"{tmp_path}/a.safetensors"}}'
    assert "scores repeat: hpsv2, hpsv2" in refused(*OWN, f"samples.judging.preferences=[{one},{one}]")


def test_weights_of_another_hash(refused, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    one = f'{{"name":"hpsv2","weights":"{tmp_path}/a.safetensors","sha256":"{"0" * 64}"}}'
    assert "is expected" in refused(*OWN, f"samples.judging.preferences=[{one}]")
