"""The command `generate`: captions, seeds, negative captions, start images, and the files it writes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import generate
from jobs.evaluation.images import StartImage
from snapfusion.models.defaults import default_guidance
from snapfusion.models.load import load


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tiny_teacher):
    """Generates with the tiny model in two steps, and returns the new files by name."""

    def run_command(*words: str, code: int = 0) -> dict[str, np.ndarray]:
        before = set(Path().iterdir())
        assert generate.main([*words, "--model", tiny_teacher, "--steps", "2"]) == code
        new = sorted(set(Path().iterdir()) - before)
        return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in new}

    return run_command


def parameters(name: str) -> str:
    """The text about how an image was made, in a PNG or in EXIF."""
    with Image.open(name) as image:
        if image.format == "PNG":
            return image.text["parameters"]
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be")


def test_each_image_is_a_file_with_its_origin(run, tiny_teacher):
    Path("prompts.txt").write_text("red\nblue\n\nred\n")
    files = run("--prompts", "prompts.txt", "--seeds", "1,2", "--out", "a.png", "--guidance", "3")
    assert list(files) == ["a-0.png", "a-1.png", "a-2.png", "a-3.png"]
    texts = [parameters(name) for name in files]
    assert texts[2] == (
        "blue\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 1, Size: 16x16, "
        f"Model: {Path(tiny_teacher).name}, Image: 0"
    )
    alone = run("blue", "--seed", "1", "--out", "b.png", "--guidance", "3")
    np.testing.assert_array_equal(alone["b.png"], files["a-2.png"])


def test_captions_come_from_a_column(run, capsys):
    Path("prompts.csv").write_text("Prompt,title\nred,blue\n")
    for name, words in (("red", []), ("blue", ["--caption-column", "title"])):
        (file,) = run("--prompts", "prompts.csv", *words)
        assert parameters(file).startswith(f"{name}\nSteps: ")
    run("--prompts", "prompts.csv", "--caption-column", "text", code=2)
    assert "prompts.csv: no caption column named text; it has Prompt, title: " in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".png"])
def test_format_is_that_of_the_name(run, ending):
    (name,) = run("red", "--negative", "blue", "--out", f"a{ending}")
    with Image.open(name) as image:
        assert image.format == {".jpg": "JPEG", ".webp": "WEBP", ".png": "PNG"}[ending]
    assert parameters(name).startswith("red\nNegative prompt: blue\nSteps: 2")


def test_no_file_is_overwritten(run):
    first = run("red")
    assert list(run("red", "--seed", "1")) == ["image-1.png"]
    assert list(run("red", "--seed", "2")) == ["image-2.png"]
    np.testing.assert_array_equal(np.asarray(Image.open("image.png")), first["image.png"])


def test_sheet_has_a_row_for_each_caption(run):
    Path("prompts.txt").write_text("red\nblue\ngreen\n")
    (sheet,) = run("--prompts", "prompts.txt", "--seeds", "1,2", "--sheet").values()
    assert sheet.shape == (3 * 256, 2 * 256, 3)


def test_negative_caption_changes_the_image(run):
    plain, empty, negative = (
        next(iter(run("red", "--guidance", "4", *words).values()))
        for words in ((), ("--negative", ""), ("--negative", "blue"))
    )
    np.testing.assert_array_equal(plain, empty)
    assert (plain != negative).any()


def test_start_image_is_kept_with_little_strength(run):
    Image.fromarray(np.full((20, 30, 3), (255, 0, 0), np.uint8)).save("start.png")
    noise = next(iter(run("red").values()))
    full = next(iter(run("red", "--image", "start.png", "--strength", "1").values()))
    half = next(iter(run("red", "--image", "start.png", "--strength", "0.5").values()))
    assert (half != full).any()
    assert (noise != half).any()


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 8), (0.8, 6), (0.01, 1)])
def test_strength_is_a_part_of_the_steps(strength, steps):
    assert StartImage(pixels=np.zeros((1, 1, 3), np.uint8), strength=strength).steps_of(8) == steps


def test_guidance_is_the_models_own(tiny_teacher):
    bundle = load(tiny_teacher)
    assert default_guidance(bundle) == 2.5
    bundle.distillation = {"steps": 4, "cfg_range": {"low": 3.0, "high": 6.0}}
    assert default_guidance(bundle) == 3.0


def test_damaged_start_image_is_refused(run, capsys):
    Path("start.png").write_bytes(b"<html>")
    run("red", "--image", "start.png", code=2)
    assert "--image start.png: " in capsys.readouterr().err
