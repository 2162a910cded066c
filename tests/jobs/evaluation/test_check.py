"""The command `check`: what it says of models in ten forms, and of which it says that they cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_bundle, unsealed_copy
from ldm_checkpoint import sd_shaped_bundle, write_checkpoint
from safetensors.torch import load_file, save_file

from jobs import check
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.cost import count_parameters
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.random_weights import random_bundle
from snapfusion.models.save import save

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_teacher, tmp_path) -> Path:
    """A copy of the tiny model that a test may change, without checksums."""
    return unsealed_copy(tiny_teacher, tmp_path / "model")


@pytest.fixture
def described(capsys):
    """Runs `check --json`, and returns what it found."""

    def run(source: str | Path) -> dict:
        assert check.main([str(source), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_text_has_80_columns(tiny_teacher, capsys):
    assert check.main([tiny_teacher]) == 0
    *lines, command = capsys.readouterr().out.splitlines()
    assert lines[0] == tiny_teacher
    assert max(map(len, lines[1:])) <= 80
    text = " ".join(" ".join(lines).split())
    for part in ("diffusers folder", "checksums verified", "predicts epsilon", "every value is finite"):
        assert part in text
    assert command == f"next: snapfusion run-pipeline --recipe own --set model={tiny_teacher} --dry-run"


def test_plain_folder(tiny_teacher, described):
    found, tiny = described(tiny_teacher), tiny_bundle()
    assert found["stored"]["form"] == "diffusers folder"
    assert (found["stored"]["checksums"], found["stored"]["own_tokenizer"]) == (True, True)
    assert "timestep_spacing" in found["stored"]["unused_scheduler_fields"]
    assert "beta_start" not in found["stored"]["unused_scheduler_fields"]
    assert (found["image_size"], found["latent_shape"], found["version"]) == (16, [4, 8, 8], 1)
    counts = {name: count_parameters(network) for name, network in tiny.networks.items()}
    assert found["costs"]["parameters"] == counts
    assert found["costs"]["float16_bytes"] == 2 * sum(counts.values())
    assert found["costs"]["gmacs"] > 0


def test_variant_is_read_and_other_weights_are_counted(folder, described):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(bytes(100))
    stored = described(folder)["stored"]
    assert [Path(file["name"]).suffixes for file in stored["files"]] == [[".fp16", ".safetensors"]] * 3
    assert [file["dtypes"] for file in stored["files"]] == [["float16"]] * 3
    assert (stored["unread_bytes"], stored["checksums"]) == (100, False)


def test_sharded_folder(folder, described):
    (folder / UNET_FILE).unlink()
    tiny_bundle().unet.half().save_pretrained(folder / "unet", max_shard_size="20KB")
    names = [file["name"] for file in described(folder)["stored"]["files"]]
    assert names == sorted(names)
    assert sum("-of-" in name for name in names) > 1


def test_single_file_and_its_averaged_weights(tmp_path, described):
    tensors = ldm_tensors(sd_shaped_bundle(version=2))
    tensors["model_ema.decay"] = torch.zeros(())
    path = write_checkpoint(tmp_path / "tune.safetensors", tensors)
    found = described(f"{path}?prediction_type=v_prediction&size=128")
    assert (found["version"], found["prediction_type"]) == (2, "v_prediction")
    assert found["stored"]["form"] == "single file"
    assert found["stored"]["prediction_type_from"] == "the option prediction_type"
    assert (found["stored"]["averaged_weights"], found["stored"]["own_tokenizer"]) == (True, False)


def test_merged_lora_has_its_ranks_and_alphas(tiny_teacher, tmp_path, described):
    weight, name = tiny_bundle().unet.conv_in.weight, "lora_unet_conv_in"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, *weight.shape[1:]),
        f"{name}.lora_up.weight": torch.ones(len(weight), 2, 1, 1),
    }
    for alpha, expected in ((torch.tensor(1.0), [1.0]), (None, [])):
        own = {} if alpha is None else {f"{name}.alpha": alpha}
        save_file(tensors | own, tmp_path / "style.safetensors", metadata={"format": "pt"})
        found = described(f"{tiny_teacher}?lora={tmp_path}/style.safetensors:0.5")
        (lora,) = found["merged"]
        assert (lora["weight"], lora["modules"], lora["ranks"], lora["alphas"]) == (0.5, 1, [2], expected)
        assert any("does not say alpha" in note for note in found["notes"]) == (alpha is None)


def test_textual_inversion_has_its_token(tiny_teacher, tmp_path, described, capsys):
    save_file({"<cat>": torch.zeros(2, 16)}, tmp_path / "cat.safetensors")
    source = f"{tiny_teacher}?embedding={tmp_path}/cat.safetensors"
    (embedding,) = described(source)["merged"]
    assert (embedding["token"], embedding["vectors"]) == ("<cat>", 2)
    assert check.main([source]) == 0
    assert "cat.safetensors: token <cat>, 2 vectors" in " ".join(capsys.readouterr().out.split())


def test_student_is_compiled_next(tmp_path, described):
    save(tiny_bundle(), tmp_path / "student" / "model", distillation={"steps": 8})
    found = described(tmp_path / "student")
    assert (found["stored"]["form"], found["distillation"]) == ("run folder", {"steps": 8})
    assert found["next"].startswith("snapfusion compile-mobile ")


def test_random_weights_are_not_built(described, monkeypatch):
    def on_meta(name: str):
        assert torch.get_default_device().type == "meta"
        return random_bundle(name)

    monkeypatch.setattr("snapfusion.models.network_sizes.random_bundle", on_meta)
    found = described("random:sd15")
    assert found["published_sizes"]
    assert 390 < found["costs"]["gmacs"] < 410


def test_missing_tokenizer_is_said(tmp_path, described):
    save(sd_shaped_bundle(), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    (tmp_path / "model" / CHECKSUMS_FILE).unlink()
    found = described(tmp_path / "model")
    assert not found["stored"]["own_tokenizer"]
    assert found["notes"] == [f"{tmp_path}/model has no tokenizer; CLIP's is used"]


def sdxl(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    changed = {**index, "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(changed))


def lfs_pointer(folder: Path) -> None:
    (folder / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\nsize 3438167534\n")


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / UNET_FILE)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [(sdxl, "is an SDXL model"), (lfs_pointer, "run `git lfs pull`"), (not_a_number, "NaN or infinite")],
)
def test_models_that_cannot_be_used_are_refused(folder, damage, message, capsys):
    damage(folder)
    assert check.main([str(folder)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
