"""A bundle can be verified, and images sampled from it, in any folder; any change of a file is reported."""

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import tiny_student
from PIL import Image

from jobs import command, generate, verify_bundle
from jobs.evaluation.images import generate_images
from snapfusion.export.bundle import open_bundle
from snapfusion.models.checksums import file_records
from snapfusion.models.load import load


@pytest.fixture
def copied(mobile_bundle, tmp_path):
    return shutil.copytree(mobile_bundle, tmp_path / "copy")


def refused(folder, capsys):
    """The one line that is message of the bundle, which must be refused."""
    assert verify_bundle.main([str(folder)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("verify_bundle: ")
    return line


def rehash(folder, name):
    """Record the size and hash of a changed file in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def changed_json(folder, name):
    """Values of a JSON file of the bundle, which are written back with their hash."""
    values = json.loads((folder / name).read_text())
    yield values
    (folder / name).write_text(json.dumps(values))
    rehash(folder, name)


def test_a_sound_bundle_is_checked_part_by_part(mobile_bundle, capsys):
    assert command.main(["verify-bundle", str(mobile_bundle)]) == 0
    message = capsys.readouterr().out
    assert "as in the manifest" in message
    assert "3 steps agree" in message
    assert "3 captions have the expected ids" in message
    for part in ("/text_encoder: ", "/unet: ", "/decoder: ", ", the image: "):
        assert f"  executorch{part}" in message
    if sys.platform != "darwin":
        assert "coreml: not executed, Core ML is not available here" in message


@pytest.mark.parametrize(
    "name",
    ["sampler.json", "executorch/unet.pte", "tokenizer/tokenizer.json", "vectors/noise.f32", "MODEL_CARD.md"],
)
def test_a_flipped_byte_is_found_in_any_file(name, copied, capsys):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(bytes(data))
    assert f"{name} was altered" in refused(copied, capsys)


def test_a_missing_and_an_added_file_are_named(copied, capsys):
    (copied / "notes.txt").write_text("mine")
    assert "notes.txt is not in the manifest" in refused(copied, capsys)
    (copied / "notes.txt").unlink()
    (copied / "executorch/decoder.pte").unlink()
    assert "executorch/decoder.pte is missing" in refused(copied, capsys)


@pytest.mark.parametrize("name", ["executorch/unet.pte", "../elsewhere.pte"])
def test_a_program_outside_the_bundle_is_refused(name, tmp_path, capsys):
    folder, outside = tmp_path / "bundle", tmp_path / "elsewhere.pte"
    outside.write_bytes(b"program")
    (folder / "executorch").mkdir(parents=True)
    (folder / "executorch/unet.pte").symlink_to(outside if name.startswith("executorch") else "other")
    (folder / "executorch/other").write_bytes(b"program")
    variants = {"executorch": {"modules": {"unet": {"files": [name]}}}}
    manifest = {"format": 2, "variants": variants, "files": file_records(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"{name} lies outside the bundle" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1}', "of format 1; formats 2 and 3 are accepted"),
        ("{}", "of format None; formats 2 and 3 are accepted"),
        ("[]", "manifest.json holds list; a JSON object is accepted"),
        ("{", "manifest.json is damaged: Expecting property name"),
    ],
)
def test_a_bundle_of_another_version_is_refused(text, message, copied, capsys):
    (copied / "manifest.json").write_text(text)
    assert message in refused(copied, capsys)


def test_a_folder_without_bundle_is_refused(tmp_path, capsys):
    assert "has no manifest.json: it is not a mobile bundle" in refused(tmp_path, capsys)


def test_a_changed_coefficient_is_found(copied, capsys):
    with changed_json(copied, "sampler.json") as values:
        values["steps"][1]["from_output"] *= 1.001
    assert "step 1 (t = 666): from_output is" in refused(copied, capsys)


def test_a_sampler_of_another_prediction_is_found(copied, capsys):
    with changed_json(copied, "sampler.json") as values:
        for step in values["steps"]:
            step["from_z"] = step["alpha_next"] / step["alpha"]
            step["from_output"] = step["sigma_next"] - step["alpha_next"] * step["sigma"] / step["alpha"]
        values["prediction_type"] = "epsilon"
    assert "differs from the test vectors" in refused(copied, capsys)


def test_inconsistent_vectors_are_found(copied, capsys):
    (np.fromfile(copied / "vectors/output-0.f32", "<f4") + 1.0).tofile(copied / "vectors/output-0.f32")
    rehash(copied, "vectors/output-0.f32")
    assert "step 0 (t = 999) differs" in refused(copied, capsys)


def test_a_program_of_other_weights_is_found(copied, capsys):
    from snapfusion.export.executorch import compile_executorch
    from snapfusion.export.modules import text_encoder_module

    other = text_encoder_module(tiny_student(seed=9).text_encoder, length=16)
    (copied / "executorch/text_encoder.pte").write_bytes(compile_executorch(other))
    rehash(copied, "executorch/text_encoder.pte")
    assert "executorch/text_encoder does not agree with torch" in refused(copied, capsys)


def test_a_tokenizer_of_another_model_is_found(copied, capsys):
    with changed_json(copied, "tokenizer/tokenizer.json") as tokenizer:
        vocab = tokenizer["model"]["vocab"]
        vocab["r"], vocab["e"] = vocab["e"], vocab["r"]
        vocab["red</w>"], vocab["d</w>"] = vocab["d</w>"], vocab["red</w>"]
    assert "tokenizer gives other ids than the test vectors for 'red'" in refused(copied, capsys)


# --- generating


def test_a_bundle_generates_what_the_model_generates(mobile_bundle, mobile_model, tmp_path, capsys):
    path = tmp_path / "image.png"
    options = [
        "a red thing",
        "--bundle",
        str(mobile_bundle),
        "--seed",
        "5",
        "-n",
        "2",
        "--sheet",
        "--out",
        str(path),
    ]
    assert command.main(["generate", *options]) == 0
    message = capsys.readouterr()
    assert "3 steps of executorch" in message.out
    assert "6/6" in message.err  # the progress bar
    expected = generate_images(load(mobile_model), ["a red thing"], steps=3, guidance=2.0, seed=5, count=2)
    generated = np.asarray(Image.open(path))[::16, ::16].astype(int)
    assert np.abs(generated - np.concatenate(expected, axis=1).astype(int)).max() <= 1


@pytest.mark.slow
def test_a_bundle_needs_no_model(mobile_bundle, tmp_path):
    """Nothing of the model's folder is read, and no diffusers network is built."""
    path = tmp_path / "alone.png"
    code = (
        "import sys; from unittest import mock; import snapfusion.models.load as load;"
        "load.load = lambda *_, **__: sys.exit('the model was loaded');"
        "from jobs import generate; sys.exit(generate.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "red", "--bundle", str(mobile_bundle), "--out", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert path.exists()


def test_guidance_changes_the_image(mobile_bundle, tmp_path):
    images = []
    for w in ("1.0", "6.0"):
        path = tmp_path / f"{w}.png"
        options = ["--bundle", str(mobile_bundle), "--guidance", w, "--out", str(path)]
        assert generate.main(["red", *options]) == 0
        images.append(np.asarray(Image.open(path)))
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "coreml"], "has coreml for Core ML; ExecuTorch or ONNX Runtime runs here"),
        (
            ["--variant", "none"],
            "has no variant 'none'; executorch, coreml, coreml-6bit are",
        ),
        (["--model", "mini"], "--model mini: a --bundle has its own, compiled into it"),
        (["--steps", "8"], "--steps 8: a --bundle has its own, compiled into it"),
        (["--guidance", "0.5"], "--guidance 0.5: 1.0 and more is accepted"),
        (["--out", "/dev/null/x.png"], "--out /dev/null/x.png: "),
    ],
)
def test_a_mistake_is_one_line(options, message, mobile_bundle, capsys):
    assert generate.main(["red", "--bundle", str(mobile_bundle), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_damaged_bundle_generates_nothing(copied, tmp_path, capsys):
    (copied / "executorch/unet.pte").write_bytes(b"nothing")
    assert generate.main(["red", "--bundle", str(copied), "--out", str(tmp_path / "p.png")]) == 2
    assert "--bundle " in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_a_variant_without_a_bundle_is_refused(capsys):
    assert generate.main(["red", "--variant", "executorch"]) == 2
    assert "--variant executorch: only a --bundle has variants" in capsys.readouterr().err


def test_vectors_hold_the_whole_trajectory(mobile_bundle):
    vectors = open_bundle(mobile_bundle).vectors
    assert vectors.num_steps == 3
    assert vectors.arrays["c"].shape == (2, 16, 16)
    assert vectors.arrays["image"].shape == (1, 3, 16, 16)
    assert set(vectors.token_ids) == {"", "red", "a red thing"}
