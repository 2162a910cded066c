"""Tests of mobile bundles: published whole, once, and only if every part agrees with torch."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MOBILE, tiny_bundle, tiny_student
from PIL import Image
from set_options import set_options
from torch import nn

import snapfusion.export.build as building
import snapfusion.export.variants as variants
from jobs import compile_mobile, generate
from jobs.evaluation.bundle_images import generate_bundle_images
from jobs.evaluation.images import generate_images
from jobs.recipes.registry import recipe_named
from jobs.training.mobile_bundle import check_parts, publish_bundle
from jobs.verify_bundle import verify
from snapfusion.export.bundle import MobileBundle, open_bundle
from snapfusion.export.bundle_files import BundleError
from snapfusion.export.coreml_package import describe_package
from snapfusion.export.executorch import compile_executorch
from snapfusion.export.modules import FixedModule, Port, decoder_module, text_encoder_module
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.export.processes import worker_processes
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.settings import Licence, LicenceError, MobileSettings
from snapfusion.export.verification import check_sampler_and_tokenizer
from snapfusion.mini.scenes import parse_caption
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.tokenizer import build_tokenizer
from snapfusion.noise import gaussian, noise_key
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule

OPEN = Licence(weights="Apache-2.0", data="CC-BY-4.0")
FAST = {"coreml": (), "executorch": ("float32",), "guidance": 2.0, "steps": 2, "captions": ("red",)}
PARENTS = {"model": {"source": "tiny", "settings_hash": None}, "decoder": None}


pytestmark = pytest.mark.usefixtures("compiled_once")


def settings(**changes):
    return MobileSettings(**({"licence": OPEN} | FAST | changes))


def publish(path, requested, *, model=None, decoder=None):
    model = model or tiny_student(seed=3)
    return publish_bundle(requested, bundle=model, decoder=decoder, parents=PARENTS, out_url=str(path))


def assert_refused(error, message, folder, requested, **model):
    """Nothing is left of a bundle that is refused."""
    with pytest.raises(error, match=message):
        publish(folder / "bundle", requested, **model)
    assert [path.name for path in folder.iterdir()] == []


# --- what a bundle is


def test_a_bundle_holds_all_that_an_application_needs(mobile_bundle):
    manifest = open_bundle(mobile_bundle).manifest
    assert list(manifest["variants"]) == ["executorch", "coreml", "coreml-6bit"]
    for name, variant in manifest["variants"].items():
        assert set(variant["modules"]) == {"text_encoder", "unet", "decoder"}
        assert variant["images"]["samples"] == 2
        exact = name in ("coreml", "executorch")
        assert variant["images"]["psnr_db"] > (35 if exact else 20)
        for module in variant["modules"].values():
            assert module["parity"]["psnr_db"] > (35 if exact else 15)
    unet = manifest["variants"]["executorch"]["modules"]["unet"]
    ports = [(name, port["position"], port["shape"]) for name, port in unet["inputs"].items()]
    assert ports == [("z_t", 0, [1, 4, 8, 8]), ("t", 1, [1]), ("c", 2, [2, 16, 16])]
    assert set(manifest["versions"]) >= {"torch", "executorch", "coremltools", "snapfusion-ray"}
    assert manifest["safety_checker"] is None
    assert manifest["identity"]["steps"] == 3


def test_the_manifest_has_every_files_size_and_hash(mobile_bundle):
    stated = json.loads((mobile_bundle / "manifest.json").read_text())["files"]
    found = {
        path.relative_to(mobile_bundle).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in mobile_bundle.rglob("*")
        if path.is_file() and path != mobile_bundle / "manifest.json"
    }
    assert found == stated
    assert found.keys() >= {"MODEL_CARD.md", "sampler.json", "tokenizer/tokenizer.json"}


def test_the_card_states_both_licences(mobile_bundle):
    card = (mobile_bundle / "MODEL_CARD.md").read_text()
    assert "- Weights: Apache-2.0\n" in card
    assert "- Data: CC0-1.0\n" in card
    assert "No safety checker is part of this bundle" in card


def test_images_equal_those_of_torch(mobile_bundle):
    manifest = open_bundle(mobile_bundle).manifest
    for number in range(2):
        torchs = np.asarray(Image.open(mobile_bundle / f"pictures/torch-{number}.png")).astype(int)
        for name in manifest["variants"]:
            image = np.asarray(Image.open(mobile_bundle / f"pictures/{name}-{number}.png")).astype(int)
            # Of float programs a gray level apart at most, where both lie at the same edge of rounding.
            assert np.abs(image - torchs).max() <= (1 if name in ("executorch", "coreml") else 25)
            assert image.std() > 0


def test_the_same_again_is_not_compiled_again(mobile_bundle, mobile_model, monkeypatch, capsys):
    monkeypatch.delattr(variants, "compile_executorch")
    before = (mobile_bundle / "manifest.json").stat()
    assert compile_mobile.main([mobile_model, "--out", str(mobile_bundle.parent), *set_options(MOBILE)]) == 0
    assert "executorch: " in capsys.readouterr().out
    assert (mobile_bundle / "manifest.json").stat() == before


def test_a_bundle_of_other_settings_is_refused(mobile_bundle, mobile_model, capsys):
    options = set_options([*MOBILE, "mobile.seed=1"])
    assert compile_mobile.main([mobile_model, "--out", str(mobile_bundle.parent), *options]) == 2
    assert "made otherwise (settings.seed is 0 there, 1 here)" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_compiled(mobile_model, tmp_path, capsys):
    assert compile_mobile.main([mobile_model, "--out", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"would compile {mobile_model} with the decoder {tmp_path}/decoder" in printed
    assert f"into {tmp_path}/mobile" in printed
    assert "ExecuTorch float32, ExecuTorch int8, Core ML float16, Core ML palette-6" in printed
    assert [*tmp_path.iterdir()] == []
    # The recipe's licences are the miniature's.
    missing = [line.split()[1] for line in printed.splitlines() if line.startswith("missing: ")]
    assert missing == ["mobile.licence.weights", "mobile.licence.data"]


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_bytes(tmp_path, monkeypatch):
    publish(tmp_path / "one", settings())
    monkeypatch.setattr(building, "worker_processes", lambda _: worker_processes(2))
    monkeypatch.setattr(building, "num_processes", lambda **_: 2)
    publish(tmp_path / "two", settings())
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


@pytest.mark.slow
def test_two_unet_calls_give_the_same_image(tmp_path, mobile_bundle):
    one = publish(tmp_path / "one", settings(conditions=1))
    two = open_bundle(mobile_bundle).manifest
    for made, conditions in ((one, 1), (two, 2)):
        variant = made["variants"]["executorch"]
        assert variant["modules"]["unet"]["inputs"]["c"]["shape"] == [conditions, 16, 16]
        assert variant["images"]["psnr_db"] > 80


def w_conditioned_student(**distillation):
    """A student of two steps whose output depends on its guidance input."""
    model = tiny_student(seed=3)
    model.unet = with_guidance_embedding(model.unet)
    torch.manual_seed(3)
    nn.init.normal_(model.unet.time_embedding.cond_proj.weight, std=0.5)
    model.distillation = {"steps": 2, "w_conditioned": True, "cfg_range": {"low": 1.0, "high": 6.0}}
    model.distillation |= distillation
    return model


@pytest.fixture(scope="module")
def w_conditioned_bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("w-conditioned") / "bundle"
    publish(path, settings(guidance=2.0), model=w_conditioned_student())
    return path


def test_w_conditioned_bundle_takes_one_pass_a_step(w_conditioned_bundle):
    bundle, calls = open_bundle(w_conditioned_bundle), []
    variant = bundle.manifest["variants"]["executorch"]
    assert (bundle.manifest["conditions"], bundle.manifest["folded_guidance"]) == (1, 2.0)
    assert variant["modules"]["unet"]["inputs"]["c"]["shape"] == [1, 16, 16]
    assert variant["images"]["psnr_db"] > 80
    assert bundle.sampler.guidance == 1.0
    assert bundle.vectors.arrays["output-0"].shape == (1, 4, 8, 8)
    programs = bundle.programs("executorch")
    counted = dataclasses.replace(programs, unet=lambda ports: calls.append(ports) or programs.unet(ports))
    (image,) = generate_bundle_images(bundle, counted, "red", guidance=None, seed=0, count=1)
    assert len(calls) == 2
    torchs = [
        generate_images(w_conditioned_student(), ["red"], steps=2, guidance=w, seed=0, count=1)[0].astype(int)
        for w in (2.0, 6.0)
    ]
    assert np.abs(image - torchs[0]).max() <= 1
    assert np.abs(image - torchs[1]).max() > 5
    verify(w_conditioned_bundle)


def test_guidance_of_a_w_conditioned_bundle_is_fixed(w_conditioned_bundle, tmp_path, capsys):
    arguments = ["red", "--bundle", str(w_conditioned_bundle), "--out", str(tmp_path / "a.png")]
    assert generate.main([*arguments, "--guidance", "3"]) == 2
    assert "--guidance 3: guidance 2 is compiled into this bundle" in capsys.readouterr().err
    assert generate.main([*arguments, "--negative", "blue"]) == 2
    assert generate.main(arguments) == 0


def test_students_that_a_bundle_cannot_sample_are_refused(tmp_path):
    outside = r"mobile\.guidance is 7\.5, and .* was distilled for 1 to 6"
    assert_refused(BundleError, outside, tmp_path, settings(guidance=7.5), model=w_conditioned_student())
    other = w_conditioned_student(sampler="dpm++")
    message = r"the sampler dpm\+\+, and a bundle has the steps of ddim or consistency"
    assert_refused(BundleError, message, tmp_path, settings(), model=other)
    few = w_conditioned_student(**LCM)
    message = r"mobile\.steps is 9: num_steps is 9; a student of 8 points"
    assert_refused(BundleError, message, tmp_path, settings(steps=9), model=few)


LCM = {"sampler": "consistency", "points": 8, "steps": 4}


@pytest.fixture(scope="module")
def lcm_bundle(tmp_path_factory, w_conditioned_bundle):
    """Of the same networks."""
    path = tmp_path_factory.mktemp("lcm") / "bundle"
    publish(path, settings(guidance=2.0, steps=None), model=w_conditioned_student(**LCM))
    return path


def test_consistency_bundle_adds_the_noise_of_generate(lcm_bundle):
    bundle = open_bundle(lcm_bundle)
    assert (bundle.manifest["format"], bundle.sampler.solver) == (3, "consistency")
    assert bundle.manifest["variants"]["executorch"]["images"]["psnr_db"] > 80
    arrays, key = bundle.vectors.arrays, noise_key(0, "red", 0)
    assert {name for name in arrays if name.startswith("noise")} == {"noise", "noise-0", "noise-1", "noise-2"}
    np.testing.assert_array_equal(arrays["noise-0"][0], gaussian(noise_key("step", key, 749), (4, 8, 8)))
    programs, sampling = bundle.programs("executorch"), {"seed": 0, "count": 2}
    images = generate_bundle_images(bundle, programs, "red", guidance=None, **sampling)
    model, drawing = w_conditioned_student(**LCM), {"steps": 4, "guidance": 2.0, **sampling}
    torchs = generate_images(model, ["red"], solver="consistency", **drawing)
    for image, expected in zip(images, torchs, strict=True):
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1
    (ddim, _) = generate_images(model, ["red"], **drawing)
    assert np.abs(images[0].astype(int) - ddim.astype(int)).max() > 5
    verify(lcm_bundle)


def test_a_sampler_without_its_noise_is_noticed(lcm_bundle, tmp_path):
    copied = shutil.copytree(lcm_bundle, tmp_path / "copy")
    kinds = {"prediction_type": "v_prediction", "guidance": 1.0}
    ddim = SamplerCoefficients.of(Schedule(), grid=time_grid(4), **kinds)
    (copied / "sampler.json").write_text(json.dumps(ddim.to_values()))
    bundle = MobileBundle(folder=copied, manifest=open_bundle(lcm_bundle).manifest)
    with pytest.raises(ParityError, match=r"step 0 \(t = 999\) and the test vectors differ in noise"):
        list(check_sampler_and_tokenizer(bundle))


@pytest.mark.slow
def test_student_guided_by_its_teacher_takes_one_pass(tmp_path):
    """As PCM's: an ordinary UNet that is used at w = 1."""
    model = tiny_student(seed=3)
    model.distillation = {"steps": 2, "cfg_range": {"low": 1.0, "high": 1.0}}
    manifest = publish(tmp_path / "one", settings(guidance=1.0), model=model)
    assert (manifest["conditions"], manifest["folded_guidance"]) == (1, 1.0)
    assert manifest["variants"]["executorch"]["images"]["psnr_db"] > 80


def test_the_miniatures_captions_describe_scenes():
    assert all(parse_caption(caption) for caption in recipe_named("mini").mobile.captions)


def test_a_core_ml_delegate_program_computes_what_torch_does(tmp_path):
    (variant,) = variants.variants_of(settings(executorch=("coreml",)))
    module = text_encoder_module(tiny_student(seed=3).text_encoder, length=16)
    (tmp_path / variant.name).mkdir()
    compiled = variants.compile_module(variant, module, tmp_path, scratch=tmp_path, chunk_bytes=2**30)
    assert compiled.files == ("executorch-coreml/text_encoder.pte",)
    inputs = [np.arange(16, dtype=np.int32)[None]]
    parity = check_parity(
        artifact="it", outputs=[compiled.run(inputs)], references=[module.reference(inputs)]
    )
    assert 50 < parity.psnr_db < 100


@pytest.mark.slow
def test_core_ml_delegate_programs_are_compared_with_torch(tmp_path, capsys):
    variant = publish(tmp_path / "bundle", settings(executorch=("coreml",)))["variants"]["executorch-coreml"]
    assert variant["runtime"] == "ExecuTorch on Core ML"
    assert 50 < variant["images"]["psnr_db"] < 100
    assert generate.main(["red", "--bundle", str(tmp_path / "bundle")]) == 2
    assert "has no ExecuTorch programs that run here" in capsys.readouterr().err


# --- the gate


def perturbed(module):
    """The module with one weight matrix that is not the model's: noise of half its spread is added."""
    network = deepcopy(module.network)
    weight = next(each for each in network.parameters() if each.ndim > 1)
    with torch.no_grad():
        weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return FixedModule(name=module.name, network=network, inputs=module.inputs, outputs=module.outputs)


@pytest.mark.parametrize(
    "name",
    ["text_encoder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet", "decoder"))],
)
def test_a_program_with_a_perturbed_weight_is_refused(name, tmp_path, monkeypatch):
    real = variants.compile_executorch

    def compiled(module, **how):
        return real(perturbed(module) if module.name == name else module, **how)

    monkeypatch.setattr(variants, "compile_executorch", compiled)
    message = rf"executorch/{name} does not agree with torch: .* 35 dB is the limit"
    assert_refused(ParityError, message, tmp_path, settings())


@pytest.mark.slow
def test_a_package_with_a_perturbed_weight_is_refused(tmp_path, monkeypatch):
    real = variants.compile_coreml
    monkeypatch.setattr(variants, "compile_coreml", lambda module, path: real(perturbed(module), path))
    message = r"lacks the network's weight|does not agree with torch"
    assert_refused(ParityError, message, tmp_path, settings(executorch=(), coreml=("float16",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"float32_results": ("conv_3",)}, "float32 .* for example conv_3"),
        ({"float32_weights": ("kernel_1",)}, "for example kernel_1"),
        ({"outputs": ()}, r"state image as None among their outputs; it is \(1, 3, 16, 16\)"),
        ({"inputs": ()}, r"state latent as None among their inputs; it is \(1, 4, 8, 8\)"),
    ],
)
def test_a_package_that_says_something_else_is_refused(change, message, mobile_bundle):
    module = decoder_module(tiny_student().vae, latent_shape=(4, 8, 8))
    described = describe_package(mobile_bundle / "coreml/decoder.mlpackage")
    variants.check_descriptions(module, [described])
    with pytest.raises(ParityError, match=message):
        variants.check_descriptions(module, [dataclasses.replace(described, **change)])


def test_a_swapped_coefficient_is_refused(tmp_path, monkeypatch):
    real = SamplerCoefficients.to_values

    def swapped(steps):
        values = real(steps)
        first, second = values["steps"][:2]
        first["from_output"], second["from_output"] = second["from_output"], first["from_output"]
        return values

    monkeypatch.setattr(SamplerCoefficients, "to_values", swapped)
    assert_refused(BundleError, r"sampler\.json: step 0 \(t = 999\): from_output is", tmp_path, settings())


@pytest.mark.parametrize("wrong", [{"grid": time_grid(5)}, {"prediction_type": "epsilon"}])
def test_the_sampler_of_another_model_is_refused(wrong, tmp_path, monkeypatch):
    real = SamplerCoefficients.of
    monkeypatch.setattr(SamplerCoefficients, "of", lambda schedule, **how: real(schedule, **how | wrong))
    message = r"the images of executorch does not agree with torch|not finite"
    assert_refused(ParityError, message, tmp_path, settings())


def test_a_wrong_tokenizer_is_refused(tmp_path, monkeypatch):
    other = build_tokenizer([("e", "d</w>")], max_length=16)
    model = tiny_student(seed=3)
    real = type(model.tokenizer).save_pretrained
    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", lambda _, path: real(other, path))
    message = "tokenizer gives other ids than the model's own for 'red'"
    assert_refused(ParityError, message, tmp_path, settings())


def test_a_model_that_gives_nan_is_refused(tmp_path):
    model = tiny_student()
    with torch.no_grad():
        model.unet.conv_out.bias[0] = torch.nan
    assert_refused(ValueError, "its weights are not usable", tmp_path, settings(), model=model)


def test_an_override_below_the_limit_is_recorded(tmp_path):
    strict = {"parity_limit_db": 500.0}
    assert_refused(ParityError, "500 dB is the limit", tmp_path, settings(**strict))
    reason = "nobody reaches 500 dB"
    made = publish(tmp_path / "bundle", settings(**strict, override={"executorch": reason}))
    variant = made["variants"]["executorch"]
    assert variant["images"]["override"] == variant["modules"]["unet"]["parity"]["override"] == reason
    assert f"limit 500 dB. Reason given: {reason}" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_an_unneeded_override_is_not_recorded(tmp_path):
    made = publish(tmp_path / "bundle", settings(override={"executorch": "just in case"}))
    assert made["variants"]["executorch"]["images"]["override"] is None
    assert "just in case" not in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_an_override_for_no_variant_is_refused(tmp_path):
    message = r"mobile\.override names executorhc; the variants are executorch"
    assert_refused(ValueError, message, tmp_path, settings(override={"executorhc": "a slip"}))


# --- licences


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "mobile.licence.weights is not stated"),
        ({"weights": "MIT"}, "mobile.licence.data is not stated"),
        ({"weights": " ", "data": "MIT"}, "mobile.licence.weights is not stated"),
        ({"weights": "CreativeML OpenRAIL-M", "data": "MIT"}, "mobile.licence.text"),
    ],
)
def test_without_a_licence_nothing_is_exported(given, message, tmp_path):
    assert_refused(LicenceError, message, tmp_path, settings(licence=Licence(**given)))


def test_a_missing_licence_names_the_option(mobile_model, tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), "--set", "mobile.licence.weights=MIT"]
    assert compile_mobile.main([mobile_model, *options]) == 2
    assert capsys.readouterr().err.startswith("compile_mobile: --set mobile.licence.data is not stated")


def test_a_licence_text_is_part_of_the_bundle(tmp_path):
    text = tmp_path / "rail.txt"
    text.write_text("You agree not to use the Model for ...")
    rail = Licence(weights="CreativeML OpenRAIL-M", data="MIT", text=str(text))
    publish(tmp_path / "out" / "bundle", settings(licence=rail))
    assert (tmp_path / "out/bundle/LICENCE").read_text() == text.read_text()
    assert "(its text is in `LICENCE`)" in (tmp_path / "out/bundle/MODEL_CARD.md").read_text()


def test_a_missing_licence_text_is_named(tmp_path):
    rail = Licence(weights="OpenRAIL-M", data="MIT", text=str(tmp_path / "none.txt"))
    message = r"--set mobile\.licence\.text=.*none\.txt"
    assert_refused(LicenceError, message, tmp_path, settings(licence=rail))


# --- the safety checker's path


class Brightness(nn.Module):
    """Marks images whose mean is above a bound."""

    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, image):
        return image.mean(dim=(1, 2, 3)) - self.bound


def checker(path, *, bound, side=16):
    module = FixedModule(
        name="safety_checker",
        network=Brightness(bound).eval(),
        inputs=(Port(name="image", shape=(1, 3, side, side)),),
        outputs=(Port(name="score", shape=(1,)),),
    )
    path.write_bytes(compile_executorch(module))
    return str(path)


def test_a_safety_checker_hides_images(tmp_path, capsys):
    requested = settings(safety_checker=checker(tmp_path / "any.pte", bound=-1.0))
    assert publish(tmp_path / "out" / "bundle", requested)["safety_checker"] == "safety_checker.pte"
    path = tmp_path / "image.png"
    assert generate.main(["red", "--bundle", str(tmp_path / "out/bundle"), "--out", str(path)]) == 0
    assert "image 0 is not shown" in capsys.readouterr().out
    assert np.asarray(Image.open(path)).max() == 0


@pytest.mark.parametrize(
    ("side", "message"),
    [
        pytest.param(32, "a .pte that takes the image", marks=pytest.mark.slow),
        (None, "not an ExecuTorch"),
    ],
)
def test_what_is_no_safety_checker_is_refused(side, message, tmp_path):
    path = tmp_path / "other.pte"
    if side:
        checker(path, bound=0.0, side=side)
    else:
        path.write_bytes(b"not a program")
    (tmp_path / "out").mkdir()
    assert_refused(ValueError, message, tmp_path / "out", settings(safety_checker=str(path)))


# --- what does not fit, and what breaks


def test_a_text_encoder_of_another_width_is_refused(tmp_path):
    model = tiny_bundle()
    model.unet = load("mini-v").unet
    assert_refused(BundleError, r"text encoder .*16 .*UNet .*64", tmp_path, settings(), model=model)


def test_the_decoder_of_another_model_is_refused():
    other = HalfDecoder.from_vae(load("mini-v").vae)
    with pytest.raises(BundleError, match="it is the decoder of another model"):
        check_parts(tiny_bundle(), other)


def test_an_inconsistent_checkpoint_is_one_line(mobile_model, tmp_path, capsys):
    path = shutil.copytree(mobile_model, tmp_path / "model")
    (path / "SHA256SUMS").unlink()
    config = json.loads((path / "unet/config.json").read_text())
    config["architecture"]["channels"] = [16]
    (path / "unet/config.json").write_text(json.dumps(config))
    assert compile_mobile.main([str(path), "--out", str(tmp_path / "run"), *set_options(MOBILE)]) == 2
    printed = capsys.readouterr().err
    assert "unet" in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "mobile").exists()


FULL = """
import resource, sys
from jobs import compile_mobile
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(compile_mobile.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_disk_that_fills_leaves_nothing_behind(mobile_model, tmp_path):
    """No file may grow beyond 40 kB, as on a disk with no more room; the programs are larger."""
    options = set_options([*MOBILE, 'mobile.coreml=["float16"]', "mobile.executorch=[]"])
    done = subprocess.run(
        [sys.executable, "-c", FULL, mobile_model, "--out", str(tmp_path / "run"), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "compile_mobile: the bundle cannot be written below" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings"]


def test_a_bundle_in_an_object_store_is_complete(bucket):
    publish(f"{bucket}/phones/bundle", settings())
    import fsspec

    files = fsspec.filesystem("s3").find(f"{bucket}/phones/bundle")
    manifest = json.loads(fsspec.open(f"{bucket}/phones/bundle/manifest.json").open().read())
    assert len(files) == len(manifest["files"]) + 1


def test_references_use_no_exported_modules():
    """The reference of programs is computed without the modules they were compiled from."""
    source = Path(building.__file__).with_name("reference.py").read_text()
    assert "export.modules" not in source
    assert "export.steps" not in source
