"""A bundle is published whole, once, and only if its artifacts agree with torch."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import jobs.compile_mobile as subject
from jobs.compile_mobile import BundleError, MobileSettings, compile_decoder
from snapfusion.export.parity import ParityError
from snapfusion.models.decoder import DecoderError, HalfDecoder

SETTINGS = MobileSettings(parity_samples=3)
PARENTS = {"pairs": {"url": "runs/pairs", "version": 4}}


def save_decoder(folder, *, seed, change=None):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.4,
        sample_size=16,
    )
    decoder = HalfDecoder.from_vae(vae)
    if change:
        change(decoder)
    decoder.save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float16)


@pytest.fixture(scope="module")
def decoder_url(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder"), seed=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, decoder_url, latents):
    folder = tmp_path_factory.mktemp("mobile") / "bundle"
    manifest = compile_decoder(
        SETTINGS, decoder_url=decoder_url, latents=latents, parents=PARENTS, out_url=str(folder)
    )
    return folder, manifest


@pytest.fixture
def compilers_of_the_bundle(bundle, monkeypatch):
    """Compilers that give the first bundle's artifacts, whatever they are asked for."""
    folder, _ = bundle
    program = (folder / "decoder.pte").read_bytes()
    monkeypatch.setattr(subject, "compile_executorch", lambda module: program)
    monkeypatch.setattr(
        subject, "compile_coreml", lambda module, path: shutil.copytree(folder / "decoder.mlpackage", path)
    )


def test_a_bundle_holds_both_artifacts_and_says_what_they_are(bundle):
    folder, manifest = bundle
    assert sorted(path.name for path in folder.iterdir()) == [
        "decoder.mlpackage",
        "decoder.pte",
        "manifest.json",
    ]
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    module = manifest["modules"]["decoder"]
    assert (module["inputs"], module["outputs"]) == ({"latent": [1, 4, 8, 8]}, {"image": [1, 3, 16, 16]})
    for artifact in module["artifacts"].values():
        assert artifact["parity"]["samples"] == 3
        assert artifact["parity"]["psnr_db"] > 50
        assert artifact["bytes"] > 10_000
    assert manifest["identity"]["parents"] == PARENTS
    assert set(manifest["versions"]) == {"torch", "executorch", "coremltools", "snapfusion-ray"}


def test_the_manifest_has_every_files_size_and_hash(bundle):
    folder, manifest = bundle
    found = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert manifest["files"] == found


def test_the_same_again_is_not_compiled_again(bundle, decoder_url, latents, monkeypatch):
    folder, manifest = bundle
    monkeypatch.delattr(subject, "compile_executorch")
    again = compile_decoder(
        SETTINGS, decoder_url=decoder_url, latents=latents, parents=PARENTS, out_url=str(folder)
    )
    assert again == manifest


def test_another_bundle_at_the_same_place_is_refused(bundle, decoder_url, latents):
    folder, _ = bundle
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="made with other latents and settings;"):
        compile_decoder(
            MobileSettings(parity_samples=2),
            decoder_url=decoder_url,
            latents=latents,
            parents=PARENTS,
            out_url=str(folder),
        )
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.usefixtures("compilers_of_the_bundle")
def test_a_program_of_another_decoder_is_refused_and_nothing_is_published(latents, tmp_path):
    other = save_decoder(tmp_path / "decoder", seed=1)
    with pytest.raises(
        ParityError, match=r"decoder\.pte does not agree with torch: PSNR .* 35 dB is the limit"
    ):
        compile_decoder(
            SETTINGS, decoder_url=other, latents=latents, parents={}, out_url=str(tmp_path / "out" / "bundle")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["decoder"]


def perturb_one_kernel(decoder):
    kernel = decoder.decoder.conv_in.weight
    with torch.no_grad():
        kernel[0] += 4 * kernel.std()


@pytest.mark.usefixtures("compilers_of_the_bundle")
def test_a_perturbed_program_is_refused_and_nothing_is_published(latents, tmp_path):
    """The compiled weights are the reference's but for one channel of one kernel."""
    perturbed = save_decoder(tmp_path / "decoder", seed=0, change=perturb_one_kernel)
    with pytest.raises(ParityError, match=r"decoder\.pte does not agree with torch"):
        compile_decoder(
            SETTINGS, decoder_url=perturbed, latents=latents, parents={}, out_url=str(tmp_path / "bundle")
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("compilers_of_the_bundle")
def test_a_perturbed_package_is_refused_though_the_program_agrees(bundle, latents, tmp_path, monkeypatch):
    perturbed = save_decoder(tmp_path / "decoder", seed=0, change=perturb_one_kernel)
    monkeypatch.setattr(
        subject,
        "ExecuTorchProgram",
        lambda program: (
            subject.decoder_module(subject.load_decoder(perturbed), latent_shape=(4, 8, 8)).reference
        ),
    )
    with pytest.raises(ParityError, match=r"decoder\.mlpackage does not agree with torch"):
        compile_decoder(
            SETTINGS, decoder_url=perturbed, latents=latents, parents={}, out_url=str(tmp_path / "bundle")
        )
    assert not (tmp_path / "bundle").exists()


def poison(decoder):
    with torch.no_grad():
        decoder.decoder.conv_in.bias[0] = torch.nan


@pytest.mark.usefixtures("compilers_of_the_bundle")
def test_a_decoder_that_gives_nan_is_refused(latents, tmp_path):
    poisoned = save_decoder(tmp_path / "decoder", seed=0, change=poison)
    with pytest.raises(ValueError, match="its weights are not usable"):
        compile_decoder(
            SETTINGS, decoder_url=poisoned, latents=latents, parents={}, out_url=str(tmp_path / "bundle")
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("compilers_of_the_bundle")
def test_a_program_that_gives_nan_is_refused(decoder_url, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(
        subject,
        "ExecuTorchProgram",
        lambda program: lambda inputs: np.full((1, 3, 16, 16), np.nan, np.float32),
    )
    with pytest.raises(ParityError, match="values that are not finite"):
        compile_decoder(
            SETTINGS, decoder_url=decoder_url, latents=latents, parents={}, out_url=str(tmp_path / "bundle")
        )
    assert not (tmp_path / "bundle").exists()


def test_a_missing_decoder_is_one_clear_message(latents, tmp_path):
    with pytest.raises(DecoderError, match="does not exist"):
        compile_decoder(
            SETTINGS,
            decoder_url=str(tmp_path / "none"),
            latents=latents,
            parents={},
            out_url=str(tmp_path / "bundle"),
        )


def test_no_latents_is_one_clear_message(decoder_url, tmp_path):
    with pytest.raises(ValueError, match="no held-out latents"):
        compile_decoder(
            SETTINGS,
            decoder_url=decoder_url,
            latents=np.zeros((0, 4, 8, 8), np.float32),
            parents={},
            out_url=str(tmp_path / "bundle"),
        )
    assert list(Path(tmp_path).iterdir()) == []
