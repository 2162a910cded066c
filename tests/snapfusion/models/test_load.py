"""A model folder is loaded whole and unaltered, or refused with the reason; no pickle is ever opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_bundle

from snapfusion.models.bundle import weight_hash
from snapfusion.models.checksums import CHECKSUMS_FILE, ChecksumError, verify_checksums, write_checksums
from snapfusion.models.load import ModelError, load, load_network
from snapfusion.models.save import DISTILLATION_FILE, save
from snapfusion.models.tokenizer import clip_tokenizer, tokenize
from snapfusion.noise import gaussian_batch

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage; without a seal, as other programs leave it."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_teacher, copy)
    (copy / CHECKSUMS_FILE).unlink()
    return copy


def test_what_is_saved_is_loaded(tiny_teacher):
    bundle = load(tiny_teacher)
    made = tiny_bundle().unet.half().float().state_dict()
    torch.testing.assert_close(bundle.unet.state_dict(), made, atol=0, rtol=0)
    assert (bundle.latent_shape, bundle.image_size, bundle.scaling_factor) == ((4, 8, 8), 16, 0.4)
    assert bundle.prediction_type == "epsilon"
    assert not any(network.training for network in bundle.networks.values())


def test_a_hash_of_weights_does_not_depend_on_their_file(tiny_teacher, folder):
    assert load(str(folder)).fingerprint() == load(tiny_teacher).fingerprint()


def test_a_folder_on_an_object_store_is_fetched_once_and_again_when_it_changed(folder, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(f"{folder}/", "/models/tiny/", recursive=True)
    first = load("memory://models/tiny").fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get", lambda *_, **__: pytest.fail("it was fetched already"))
        assert load("memory://models/tiny").fingerprint() == first
    save(tiny_bundle(seed=1), tmp_path / "other")
    store.rm("/models/tiny", recursive=True)
    store.put(f"{tmp_path / 'other'}/", "/models/tiny/", recursive=True)
    assert load("memory://models/tiny").fingerprint() != first
    store.rm("/models/tiny", recursive=True)
    with pytest.raises(ModelError, match="memory://models/tiny has no model_index"):
        load("memory://models/tiny")


def test_of_two_that_fetch_a_folder_at_a_time_one_is_first(folder, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(f"{folder}/", "/models/both/", recursive=True)
    get, came = type(store).get, []

    def overtaken(*words, **named):
        if not came:
            came.append(True)
            load("memory://models/both")
        return get(*words, **named)

    monkeypatch.setattr(type(store), "get", overtaken)
    assert load("memory://models/both").fingerprint()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_the_folder_of_a_training_is_loaded_by_the_model_in_it(tiny_teacher, folder, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path / "cache"))
    trained = tmp_path / "student"
    shutil.copytree(folder, trained / "model")
    (trained / "metrics.json").write_text("{}")
    fsspec.filesystem("memory").put(f"{trained}/", "/runs/student/", recursive=True)
    for source in (str(trained), "memory://runs/student"):
        assert load(source).fingerprint() == load(tiny_teacher).fingerprint()


def test_a_distilled_model_says_for_what(tiny_teacher, folder):
    assert load(tiny_teacher).distillation is None
    told = {"steps": 4, "cfg_range": {"low": 1.0, "high": 6.0}}
    (folder / DISTILLATION_FILE).write_text(json.dumps(told))
    assert load(str(folder)).distillation == told


@pytest.mark.parametrize("told", [{}, {"steps": 0}, {"steps": 1001}, {"steps": "four"}, []])
def test_steps_that_a_model_cannot_have_been_distilled_for_are_refused(told, folder):
    (folder / DISTILLATION_FILE).write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"distillation\.json says it was distilled for .* 1 to 1000"):
        load(str(folder))


def test_missing_parts_are_named(folder):
    (folder / UNET_FILE).unlink()
    with pytest.raises(ModelError, match=r"unet has no weights \(a \.safetensors file\)"):
        load(str(folder))
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        load(str(folder))


def test_pickled_weights_are_never_opened(folder):
    (folder / UNET_FILE).unlink()
    bomb = folder / "unet" / "diffusion_pytorch_model.bin"
    bomb.write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(
        ModelError, match=r"only pickled weights \(diffusion_pytorch_model\.bin\), which are never"
    ):
        load(str(folder))
    assert not Path("opened").exists()


def test_torn_weights_are_refused_in_one_line(folder):
    weights = folder / UNET_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="unet's weights cannot be read") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / UNET_FILE)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unet has 1 missing tensors, for example conv_in\.weight"):
        load(str(folder))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'; epsilon or v_prediction is accepted"),
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_a_schedule_that_is_not_ours_is_refused(folder, changed, said):
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changed))
    with pytest.raises(ModelError, match=said):
        load(str(folder))


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_said(source):
    with pytest.raises(ModelError, match="there is no model folder"):
        load(source)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line():
    with pytest.raises(ModelError, match=r"neither a folder here nor a model the hub gave") as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_seal_finds_what_was_altered_added_or_lost(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    write_checksums(tmp_path)
    assert verify_checksums(tmp_path)
    (tmp_path / "c").write_text("3")
    with pytest.raises(ChecksumError, match="c was added"):
        verify_checksums(tmp_path)
    (tmp_path / "c").unlink()
    (tmp_path / "b").write_text("x")
    with pytest.raises(ChecksumError, match="b was altered"):
        verify_checksums(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(ChecksumError, match="b is missing"):
        verify_checksums(tmp_path)


def test_a_sealed_model_with_altered_weights_is_refused(tiny_teacher, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_teacher, copy)
    weights = bytearray((copy / UNET_FILE).read_bytes())
    weights[-1] ^= 1
    (copy / UNET_FILE).write_bytes(weights)
    with pytest.raises(ChecksumError, match="was altered"):
        load(str(copy))


@torch.inference_mode()
def test_guidance_of_one_is_the_conditional_output(tiny_teacher):
    bundle = load(tiny_teacher)
    z_t, t = gaussian_batch([1], bundle.latent_shape), torch.tensor([500])
    c = bundle.encode_text(bundle.tokenize(["red"]))
    plainly = bundle.denoiser(c, w=1.0)(z_t, t)
    guided = bundle.denoiser(c, w=torch.ones(1, 1, 1, 1))(z_t, t)
    torch.testing.assert_close(guided.x, plainly.x, atol=1e-5, rtol=1e-5)


def test_clip_tokens_are_those_that_sd15_was_published_with():
    tokenizer = clip_tokenizer()
    told = {
        "bond": [49406, 6826, 49407],
        "a red circle": [49406, 320, 736, 7117, 49407],
        "a mouse sitting next to a computer mouse": [
            *(49406, 320, 9301, 4919, 1131, 531, 320, 11639, 652, 9301, 49407)
        ],
    }
    for text, ids in told.items():
        assert tokenize(tokenizer, [text])[0].tolist() == ids + [49407] * (77 - len(ids))
    assert tokenize(tokenizer, ["word " * 100]).shape == (1, 77)
    assert tokenize(tokenizer, ["word " * 100])[0, -1] == 49407


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_one_part_is_read_without_the_others(tiny_teacher, tmp_path, part):
    alone = tmp_path / "model"
    shutil.copytree(Path(tiny_teacher) / part, alone / part)
    network, whole = load_network(str(alone), part=part), load(tiny_teacher).networks[part]
    assert weight_hash(network) == weight_hash(whole)
    assert not network.training


def test_a_part_that_is_missing_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        load_network(str(tmp_path), part="unet")
