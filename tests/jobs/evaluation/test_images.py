"""Tests of image generation: docs/samplers.md, and distilled students."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from PIL import Image

from jobs import command
from jobs.evaluation.images import distillation_mismatch, generate_images
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.mini.vocabulary import ATTRIBUTES
from snapfusion.models.bundle import Bundle
from snapfusion.models.defaults import distilled_steps
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.solver_names import CONSISTENCY, DIFFUSERS_SOLVERS, SOLVERS

DOCUMENT = (Path(__file__).parents[3] / "docs" / "samplers.md").read_text()
CAPTIONS = 10
SLACK = 2
"""Attributes of fifty that may differ with another version of torch."""


def documented_table() -> dict[tuple[str, int, str], int]:
    """(model, steps, sampler) -> correct attributes of fifty, in the document."""
    block = "| model " + DOCUMENT.split("\n| model ")[1].split("\n## ")[0]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in block.splitlines()
        if line.startswith("|")
    ]
    samplers = [name.strip("`") for name in header[2:]]
    return {
        (model.split("`")[1], int(steps), sampler): int(cell)
        for model, steps, *cells in rows
        for sampler, cell in zip(samplers, cells, strict=True)
    }


@pytest.fixture(scope="module")
def models() -> dict[str, Bundle]:
    return {name: load(name) for name in ("mini", "mini-v")}


@pytest.fixture(scope="module", params=[False, True], ids=["guided", "w-conditioned"])
def student(request, tmp_path_factory) -> str:
    """The folder of a student of 4 steps, guided or w-conditioned."""
    folder = tmp_path_factory.mktemp("run") / "student"
    bundle = tiny_bundle()
    bundle.prediction_type = "v_prediction"
    if request.param:
        bundle.unet = with_guidance_embedding(bundle.unet)
        torch.nn.init.normal_(bundle.unet.time_embedding.cond_proj.weight, std=0.5)
    distillation = {"steps": 4, "cfg_range": {"low": 1.0, "high": 6.0}, "w_conditioned": request.param}
    save(bundle, folder / "model", dtype=torch.float32, distillation=distillation)
    (folder / "metrics.json").write_text("{}")
    return str(folder)


def check_images(images: list[np.ndarray], *, size: int) -> None:
    for image in images:
        assert (image.dtype, image.shape) == (np.uint8, (size, size, 3))
        assert len(np.unique(image)) > 10


def test_the_table_has_every_sampler():
    assert {sampler for _, _, sampler in documented_table()} == set(SOLVERS) - {
        *DIFFUSERS_SOLVERS,
        CONSISTENCY,
    }
    assert {model for model, _, _ in documented_table()} == {"mini", "mini-v"}
    assert f"{CAPTIONS} held-out captions" in DOCUMENT


@pytest.mark.parametrize(
    ("model", "steps", "sampler"),
    [
        pytest.param(*cell, marks=[pytest.mark.slow] if cell[1] > 8 and cell[::2] != ("mini", "ddim") else [])
        for cell in documented_table()
    ],
)
def test_a_cell_of_the_table(model, steps, sampler, models):
    scenes = [scene_of(HELD_OUT + number) for number in range(CAPTIONS)]
    sampling = {"steps": steps, "guidance": 4.0, "seed": 0, "count": 1, "solver": sampler}
    images = generate_images(models[model], [caption_of(scene) for scene in scenes], **sampling)
    check_images(images, size=32)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    right = int(load_oracle().score(images, scenes).sum())
    assert CAPTIONS * len(ATTRIBUTES) == 50
    assert right == pytest.approx(documented_table()[model, steps, sampler], abs=SLACK)


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("steps", [8, 4, 2])
def test_a_student_accepts_any_sampler(student, steps, sampler):
    sampling = {"steps": steps, "guidance": 2.0, "seed": 0, "count": 2, "solver": sampler}
    check_images(generate_images(load(student), ["red"], **sampling), size=16)


def test_a_student_takes_its_own_steps_by_default(student, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert command.main(["generate", "red", "--model", student, "--out", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "4 steps of ddim" in lines[0]
    arguments = ["--model", f"{student}/model", "--steps", "4", "--out", str(tmp_path / "b.png")]
    assert command.main(["generate", "red", *arguments]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("options", "this"),
    [
        (["--steps", "8"], "8 of ddim at guidance 2.5"),
        (["--sampler", "dpm++"], "4 of dpm++ at guidance 2.5"),
        (["--guidance", "7"], "4 of ddim at guidance 7"),
    ],
)
def test_a_mismatch_with_the_distillation_is_noted(student, options, this, tmp_path, capsys):
    arguments = ["--model", student, "--out", str(tmp_path / "a.png"), *options]
    assert command.main(["generate", "red", *arguments]) == 0
    line, _ = capsys.readouterr().out.splitlines()
    assert line == f"{student}: distilled for 4 steps of ddim at guidance 1 to 6; this is {this}"


def test_an_undistilled_model_takes_50_steps(models):
    assert distilled_steps(models["mini"]) == 50
    assert distillation_mismatch(models["mini"], steps=8, solver="dpm++", guidance=9.0) is None


def test_a_vanilla_student_has_no_guidance_range(models):
    vanilla = load("mini-v")
    vanilla.distillation = {"steps": 8}
    assert distillation_mismatch(vanilla, steps=8, solver="ddim", guidance=9.0) is None
    line = distillation_mismatch(vanilla, steps=4, solver="ddim", guidance=9.0)
    assert line == "distilled for 8 steps of ddim; this is 4 of ddim at guidance 9"


def test_images_that_are_not_finite_fail_the_command(tmp_path, capsys):
    bundle = tiny_bundle()
    # Finite weights, but sums of their products exceed the largest float32.
    bundle.unet.conv_out.weight.fill_(3e38)
    save(bundle, tmp_path / "model", dtype=torch.float32)
    out = tmp_path / "a.png"
    assert command.main(["generate", "red", "--model", str(tmp_path / "model"), "--out", str(out)]) == 1
    assert "values that are NaN or infinite" in capsys.readouterr().err
    assert not out.exists()


def test_guidance_changes_a_w_conditioned_image(student):
    bundle = load(student)
    low, high = (
        generate_images(bundle, ["red"], steps=4, guidance=w, seed=0, count=1, solver="ddim")[0]
        for w in (1.0, 6.0)
    )
    assert not np.array_equal(low, high)
