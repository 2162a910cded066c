"""Model folders: loaded complete and unaltered, or refused; pickles are never opened."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import tiny_bundle, unsealed_copy
from damaged_files import flip_byte
from safetensors.torch import load_file, save_file

from snapfusion.models.bundle import weight_hash
from snapfusion.models.checksums import ChecksumError, verify_checksums, write_checksums
from snapfusion.models.distillation_record import DISTILLATION_FILE
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load, load_network
from snapfusion.models.save import save
from snapfusion.models.tokenizer import clip_tokenizer, tokenize
from snapfusion.noise import gaussian_batch

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage, without checksums."""
    return unsealed_copy(tiny_teacher, tmp_path / "model")


def reason_of_failure(source: str | Path, message: str) -> str:
    """The error of loading a model, which must match `message`."""
    with pytest.raises(ModelError, match=message) as caught:
        load(str(source))
    return str(caught.value)


def test_saved_model_is_loaded(tiny_teacher):
    bundle = load(tiny_teacher)
    expected = tiny_bundle().unet.half().float().state_dict()
    torch.testing.assert_close(bundle.unet.state_dict(), expected, atol=0, rtol=0)
    assert (bundle.latent_shape, bundle.image_size, bundle.scaling_factor) == ((4, 8, 8), 16, 0.4)
    assert bundle.prediction_type == "epsilon"
    assert not any(network.training for network in bundle.networks.values())


def test_saved_model_does_not_say_where_it_was_read(tiny_teacher, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save(load(str(tiny_teacher)), first)
    save(load(str(first)), second)
    for file in first.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (second / file.relative_to(first)).read_bytes()
            assert str(tmp_path).encode() not in file.read_bytes()


def test_text_encoder_has_the_names_of_transformers_4(tiny_teacher):
    names = load_file(f"{tiny_teacher}/text_encoder/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"text_model"}


def test_fingerprint_is_independent_of_the_file(tiny_teacher, folder):
    assert load(str(folder)).fingerprint() == load(tiny_teacher).fingerprint()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An object store in memory, of whose folders copies are cached in `tmp_path`."""
    monkeypatch.setenv("SNAPFUSION_CACHE", str(tmp_path / "cache"))
    return fsspec.filesystem("memory")


def test_object_store_is_fetched_when_it_changes(folder, tmp_path, monkeypatch, store):
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
    reason_of_failure("memory://models/tiny", "memory://models/tiny has no model_index")


def test_concurrent_fetches_keep_one_copy(folder, tmp_path, monkeypatch, store):
    store.put(f"{folder}/", "/models/both/", recursive=True)
    get, calls = type(store).get, []

    def overtaken(*args, **kwargs):
        if not calls:
            calls.append(True)
            load("memory://models/both")
        return get(*args, **kwargs)

    monkeypatch.setattr(type(store), "get", overtaken)
    assert load("memory://models/both").fingerprint()
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_run_folder_loads_its_model(tiny_teacher, folder, tmp_path, store):
    run = tmp_path / "student"
    shutil.copytree(folder, run / "model")
    (run / "metrics.json").write_text("{}")
    store.put(f"{run}/", "/runs/student/", recursive=True)
    for source in (str(run), "memory://runs/student"):
        assert load(source).fingerprint() == load(tiny_teacher).fingerprint()


def test_distillation_record_is_loaded(tiny_teacher, folder):
    assert load(tiny_teacher).distillation is None
    record = {"steps": 4, "cfg_range": {"low": 1.0, "high": 6.0}}
    (folder / DISTILLATION_FILE).write_text(json.dumps(record))
    assert load(str(folder)).distillation == record


@pytest.mark.parametrize("record", [{}, {"steps": 0}, {"steps": 1001}, {"steps": "four"}])
def test_invalid_distillation_steps_fail(record, folder):
    (folder / DISTILLATION_FILE).write_text(json.dumps(record))
    reason_of_failure(folder, r"distillation\.json says it was distilled for .* 1 to 1000")


def test_missing_networks_are_named(folder):
    (folder / UNET_FILE).unlink()
    reason_of_failure(folder, "unet has no weights; save it as safetensors")
    shutil.rmtree(folder / "unet")
    reason_of_failure(folder, r"unet/config\.json is missing")


def test_pickled_weights_are_never_opened(folder):
    (folder / UNET_FILE).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    reason_of_failure(folder, r"only pickled weights \(diffusion_pytorch_model\.bin\)")
    assert not Path("opened").exists()


def test_torn_weights_fail_with_one_line(folder):
    weights = folder / UNET_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "\n" not in reason_of_failure(folder, "unet's weights cannot be read")


def test_missing_tensor_is_named(folder):
    tensors = load_file(folder / UNET_FILE)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    reason_of_failure(folder, r"unet has 1 missing tensors, such as conv_in\.weight")


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "nowhere"])
def test_missing_model_folder_fails(source):
    reason_of_failure(source, "there is no model folder or file")


def test_mistyped_path_is_not_taken_for_a_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    parent = folder.parent.name
    reason_of_failure(f"{parent}/modle", rf"there is no model folder or file .*is it '{parent}/model'")


def test_unreachable_hub_fails_with_one_line():
    message = "neither a folder here nor a model the hub gave"
    assert "\n" not in reason_of_failure("nobody/no-such-model", message)


def test_checksums_find_added_altered_and_missing_files(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    write_checksums(tmp_path)
    assert verify_checksums(tmp_path)
    changes = {
        "b is not in SHA256SUMS": lambda: second.write_text("2"),
        "a was altered": lambda: (second.unlink(), first.write_text("x")),
        "a is missing": first.unlink,
    }
    for message, change in changes.items():
        change()
        with pytest.raises(ChecksumError, match=message):
            verify_checksums(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", ".gitattributes", "unet/.DS_Store", "preview.png"])
def test_files_that_nothing_reads_may_be_added(tiny_teacher, tmp_path, name):
    copy = shutil.copytree(tiny_teacher, tmp_path / "model")
    (copy / name).write_text("added")
    assert load(str(copy)).fingerprint() == load(tiny_teacher).fingerprint()


@pytest.mark.parametrize("name", ["unet/other.safetensors", "unet/module.py", "tokenizer/added_tokens.json"])
def test_files_that_are_read_may_not_be_added(tiny_teacher, tmp_path, name):
    copy = shutil.copytree(tiny_teacher, tmp_path / "model")
    (copy / name).write_text("{}")
    with pytest.raises(ChecksumError, match=f"{name} is not in SHA256SUMS"):
        load(str(copy))


def test_altered_weights_fail(tiny_teacher, tmp_path):
    copy = shutil.copytree(tiny_teacher, tmp_path / "model")
    flip_byte(copy / UNET_FILE)
    with pytest.raises(ChecksumError, match="was altered"):
        load(str(copy))


def rename_weights(folder: Path, *, variant: str) -> None:
    """Give the weights of all networks the names of a variant."""
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def test_only_variant_is_found(tiny_teacher, folder):
    rename_weights(folder, variant="fp16")
    assert load(str(folder)).fingerprint() == load(tiny_teacher).fingerprint()


def test_variant_is_chosen_by_name(tiny_teacher, folder, tmp_path):
    save(tiny_bundle(seed=1), tmp_path / "other")
    source = tmp_path / "other" / UNET_FILE
    shutil.copy(source, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    plain, chosen = load(str(folder)).fingerprint(), load(f"{folder}?variant=non_ema").fingerprint()
    assert plain == load(tiny_teacher).fingerprint()
    assert chosen["unet"] == load(str(tmp_path / "other")).fingerprint()["unet"]
    assert chosen["vae"] == plain["vae"]
    reason_of_failure(f"{folder}?variant=fp16", "no variant 'fp16'; its variants are: non_ema")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_read(tiny_teacher, folder, variant):
    for part, network in load(tiny_teacher).networks.items():
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        network.half().save_pretrained(folder / part, max_shard_size="20KB", variant=variant)
    assert len(list(folder.glob("unet/*-of-*"))) > 1
    assert load(str(folder)).fingerprint() == load(tiny_teacher).fingerprint()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / UNET_FILE)
    tensors["conv_out.bias"][0] = value
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    reason_of_failure(folder, r"unet's tensor conv_out\.bias has values that are NaN or infinite")


def test_lora_of_a_source_is_merged(tiny_teacher, tmp_path):
    name, weight = "lora_unet_conv_in", load(tiny_teacher).unet.conv_in.weight
    tensors = {
        f"{name}.lora_down.weight": torch.ones(1, *weight.shape[1:]),
        f"{name}.lora_up.weight": torch.ones(len(weight), 1, 1, 1),
    }
    save_file(tensors, tmp_path / "style.safetensors", metadata={"format": "pt"})
    source = f"{tiny_teacher}?lora={tmp_path / 'style.safetensors'}:0.25"
    torch.testing.assert_close(load(source).unet.conv_in.weight, weight + 0.25)
    assert weight_hash(load_network(source, part="unet")) == load(source).fingerprint()["unet"]
    reason_of_failure(f"{tiny_teacher}?lora=/nowhere.safetensors", "there is no file /nowhere")


def test_git_lfs_pointer_is_named(folder):
    (folder / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\nsize 3438167534\n")
    reason_of_failure(folder, "is a git-lfs pointer.*git lfs pull")


@torch.inference_mode()
def test_denoiser_at_guidance_one_is_conditional(tiny_teacher):
    bundle = load(tiny_teacher)
    z_t, t = gaussian_batch([1], bundle.latent_shape), torch.tensor([500])
    c = bundle.encode_text(bundle.tokenize(["red"]))
    conditional = bundle.denoiser(c, w=1.0)(z_t, t)
    guided = bundle.denoiser(c, w=torch.ones(1, 1, 1, 1))(z_t, t)
    torch.testing.assert_close(guided.x, conditional.x, atol=1e-5, rtol=1e-5)


def test_clip_tokens_of_sd15():
    tokenizer = clip_tokenizer()
    expected = {
        "bond": [49406, 6826, 49407],
        "a red circle": [49406, 320, 736, 7117, 49407],
        "a mouse sitting next to a computer mouse": [
            *(49406, 320, 9301, 4919, 1131, 531, 320, 11639, 652, 9301, 49407)
        ],
    }
    for text, ids in expected.items():
        assert tokenize(tokenizer, [text])[0].tolist() == ids + [49407] * (77 - len(ids))
    assert tokenize(tokenizer, ["word " * 100]).shape == (1, 77)
    assert tokenize(tokenizer, ["word " * 100])[0, -1] == 49407


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_network_loads_without_the_others(tiny_teacher, tmp_path, part):
    alone = tmp_path / "model"
    shutil.copytree(Path(tiny_teacher) / part, alone / part)
    network, whole = load_network(str(alone), part=part), load(tiny_teacher).networks[part]
    assert weight_hash(network) == weight_hash(whole)
    assert not network.training


def test_missing_network_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        load_network(str(tmp_path), part="unet")


def test_guidance_is_limited_to_an_interval(tiny_teacher):
    bundle, z_t = load(tiny_teacher), gaussian_batch([1], (4, 8, 8))
    c = bundle.encode_text(bundle.tokenize(["red"]))
    limited = bundle.denoiser(c, w=3.0, interval=(249, 749))
    for time, w in ((999, 1.0), (749, 3.0), (249, 3.0), (124, 1.0)):
        t = torch.tensor([time])
        assert torch.equal(limited(z_t, t).x, bundle.denoiser(c, w=w)(z_t, t).x)
    t = torch.tensor([749])
    rescaled, guided = (bundle.denoiser(c, w=3.0, rescaled=share)(z_t, t).x for share in (0.7, 0.0))
    assert not torch.equal(rescaled, guided)
