"""A bundle's ONNX variants: compared with torch, verified, executed and benchmarked as the others are."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import tiny_student
from PIL import Image

import snapfusion.export.variants as variants
from jobs import benchmark, command, compile_mobile, generate, verify_bundle
from jobs.evaluation import bundle_benchmark
from jobs.evaluation.images import generate_images
from jobs.evaluation.module_benchmark import ModuleBenchmark, ModuleRun, OnnxRuntime, benchmark_module
from jobs.training.mobile_bundle import publish_bundle
from snapfusion.export.bundle import open_bundle
from snapfusion.export.bundle_files import BundleError
from snapfusion.export.parity import ParityError
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.models.checksums import file_records

PARENTS = {"model": {"source": "tiny", "settings_hash": None}, "decoder": None}
SETTINGS = {
    "executorch": (),
    "coreml": (),
    "guidance": 2.0,
    "steps": 3,
    "captions": ("red", "a red thing"),
    "licence": Licence(weights="Apache-2.0", data="CC0-1.0"),
}
KINDS = ("float32", "float16", "int8")
GUIDE = Path(__file__).parents[3] / "infra/onnx/text_to_image.py"

pytestmark = pytest.mark.usefixtures("compiled_once")


def publish(path, *, kinds=KINDS, distillation=None, **changes):
    settings = MobileSettings(**SETTINGS | {"onnx": kinds} | changes)
    model = tiny_student(seed=3)
    model.distillation = distillation
    return publish_bundle(settings, bundle=model, decoder=None, parents=PARENTS, out_url=str(path))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, exported_once, compiled_once):
    path = tmp_path_factory.mktemp("onnx") / "mobile"
    publish(path)
    return path


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_each_variant_reaches_its_limit(bundle):
    entries = open_bundle(bundle).manifest["variants"]
    assert list(entries) == ["onnx", "onnx-float16", "onnx-int8"]
    for name, at_least in {"onnx": 100, "onnx-float16": 50, "onnx-int8": 20}.items():
        entry = entries[name]
        assert (entry["runtime"], entry["attention"]) == ("ONNX Runtime", "diffusers")
        assert entry["images"]["psnr_db"] > at_least
        assert entry["images"]["limit_db"] == (20.0 if name == "onnx-int8" else 35.0)
        unet = entry["modules"]["unet"]
        assert unet["files"] == [f"{name}/unet.onnx"]
        assert unet["operations"] > 100
        assert [port["position"] for port in unet["inputs"].values()] == [0, 1, 2]
    assert {"onnx", "onnxruntime"} <= set(open_bundle(bundle).manifest["versions"])
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "| `onnx-float16` | float16 |" in card


def test_float16_names_what_computed_it(bundle):
    entries = open_bundle(bundle).manifest["variants"]
    assert entries["onnx"]["measured"] == "executed in ONNX Runtime"
    assert "in float32" in entries["onnx-float16"]["measured"]


def test_bundles_of_before_keep_their_identity(tmp_path):
    """A bundle of a release that knows no ONNX is not refused by this one."""
    kept = publish(tmp_path / "mobile", kinds=())
    assert "onnx" not in kept["identity"]["settings"]
    assert publish(tmp_path / "mobile", kinds=()) == kept
    with pytest.raises(BundleError, match=r"settings\.onnx"):
        publish(tmp_path / "mobile")


def test_a_perturbed_model_is_refused(tmp_path, monkeypatch, exported_once):
    real = variants.convert_onnx

    def converted(source, path, *, kind):
        real(source, path, kind=kind)
        model = onnx.load(path)
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.raw_data = bytes(reversed(tensor.raw_data))
        path.write_bytes(model.SerializeToString())

    monkeypatch.setattr(variants, "convert_onnx", converted)
    with pytest.raises(ParityError, match=r"onnx/|onnx gives"):
        publish(tmp_path / "mobile", kinds=("float32",))
    assert list(tmp_path.iterdir()) == []


def test_a_received_bundle_is_verified(bundle, capsys):
    assert command.main(["verify-bundle", str(bundle)]) == 0
    message = capsys.readouterr().out
    for part in ("/text_encoder: ", "/unet: ", "/decoder: ", ", the image: "):
        assert f"  onnx{part}" in message
        assert f"  onnx-int8{part}" in message


def test_damage_to_a_recorded_model_is_one_line(copied, capsys):
    """Though the manifest has its hash."""
    (copied / "onnx/unet.onnx").write_bytes(b"nothing")
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["onnx/unet.onnx"] = file_records(copied)["onnx/unet.onnx"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert verify_bundle.main([str(copied)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "unet.onnx: not a model for ONNX Runtime" in line


def test_onnx_generates_what_the_model_generates(bundle, tmp_path, capsys):
    path = tmp_path / "image.png"
    options = ["--bundle", str(bundle), "--runtime", "onnx", "--seed", "5", "--out", str(path)]
    assert generate.main(["a", "red", "thing", *options]) == 0
    assert "3 steps of onnx" in capsys.readouterr().out
    sampling = {"steps": 3, "guidance": 2.0, "seed": 5, "count": 1}
    (expected,) = generate_images(tiny_student(seed=3), ["a red thing"], **sampling)
    # Shown sixteen times as large.
    difference = np.asarray(Image.open(path))[::16, ::16].astype(int) - expected.astype(int)
    assert np.abs(difference).max() <= 1


@pytest.fixture
def guide(monkeypatch):
    """The guide's Python source, which needs nothing of this package."""
    assert "snapfusion" not in GUIDE.read_text()
    monkeypatch.syspath_prepend(GUIDE.parent)
    return importlib.import_module(GUIDE.stem)


def test_the_guides_source_draws_the_same(bundle, guide, tmp_path):
    arrays = open_bundle(bundle).vectors.arrays
    drawing = {"noise": lambda: arrays["noise"], "variant": "onnx"}
    image = guide.generate(bundle, arrays["token_ids"].tolist(), **drawing)
    np.testing.assert_array_equal(guide.pixels(image), Image.open(bundle / "pictures/onnx-0.png"))
    path = tmp_path / "image.png"
    subprocess.run([sys.executable, GUIDE, bundle, "a red thing", path, "7"], check=True)
    assert np.asarray(Image.open(path)).std() > 0


def test_the_guides_source_adds_noise(guide, tmp_path, exported_once):
    student = {"steps": 3, "sampler": "consistency", "points": 6}
    publish(tmp_path / "mobile", kinds=("float32",), distillation=student)
    arrays = open_bundle(tmp_path / "mobile").vectors.arrays
    noises = iter([arrays["noise"], arrays["noise-0"], arrays["noise-1"]])
    drawing = {"noise": lambda: next(noises), "variant": "onnx"}
    image = guide.generate(tmp_path / "mobile", arrays["token_ids"].tolist(), **drawing)
    np.testing.assert_array_equal(guide.pixels(image), Image.open(tmp_path / "mobile/pictures/onnx-0.png"))


def test_the_guides_source_fits_tokens(guide):
    model = tiny_student(seed=3)
    captions = ("", "red", "red square " * 30)
    empty, *_ = rows = model.tokenize(captions).tolist()
    for caption, row in zip(captions, rows, strict=True):
        plain = model.tokenizer(caption, padding=False, truncation=False)["input_ids"]
        assert guide.fit_tokens(plain, empty=empty) == guide.fit_tokens(row, empty=empty) == row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "executorch"], "has no ExecuTorch programs that run here"),
        (["--runtime", "coreml"], "Invalid value for '--runtime'"),
        (["--runtime", "onnx", "--variant", "onnx"], "--runtime onnx: --variant onnx has its own"),
        (["--variant", "onnx-int4"], "has no variant 'onnx-int4'; onnx, onnx-float16, onnx-int8 are"),
    ],
)
def test_a_wrong_runtime_is_one_line(options, message, bundle, capsys):
    assert generate.main(["red", "--bundle", str(bundle), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_runtime_without_a_bundle_is_refused(capsys):
    assert generate.main(["red", "--runtime", "onnx"]) == 2
    assert "--runtime onnx: only a --bundle has runtimes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_measured_in_a_process_of_its_own(bundle):
    ids = open_bundle(bundle).vectors.arrays["token_ids"][1:]
    run = ModuleRun(module="text_encoder", inputs=(ids,), threads=1, repeats=20)
    found = benchmark_module(OnnxRuntime(model=bundle / "onnx/text_encoder.onnx"), run)
    assert 0 < found.median_ms <= found.p95_ms
    assert found.running_mb < found.before_mb


def test_onnx_has_rows_of_the_benchmark(bundle, tmp_path, monkeypatch, capsys):
    figures = {"load_s": 0.5, "median_ms": 2.0, "p95_ms": 3.0, "repeats": 20}
    figures |= {"before_mb": 300.0, "loading_mb": 12.0, "running_mb": 8.0}
    measured = []

    def fake(runtime, run):
        measured.append(runtime)
        return ModuleBenchmark.parse(figures)

    monkeypatch.setattr(bundle_benchmark, "benchmark_module", fake)
    path = tmp_path / "results.json"
    assert benchmark.main([str(bundle), "--variant", "onnx-int8", "--json", str(path)]) == 0
    row = json.loads(path.read_text())["rows"][-1]
    assert (row["name"], row["notes"]) == ("onnx-int8", [])
    assert row["overall_s"] == pytest.approx((2 + 3 + 1) * 0.002)
    files = [f"onnx-int8/{name}.onnx" for name in ("text_encoder", "unet", "decoder")]
    assert measured == [OnnxRuntime(model=bundle / name) for name in files]
    assert "onnxruntime 1." in capsys.readouterr().out


def test_a_dry_run_names_onnx_variants(tmp_path, capsys):
    options = ["--set", 'mobile.onnx=["float16"]', "--set", "mobile.coreml=[]", "--dry-run"]
    assert compile_mobile.main(["mini-v", "--out", str(tmp_path), *options]) == 0
    assert "ExecuTorch int8, ONNX float16;" in capsys.readouterr().out
