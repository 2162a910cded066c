"""Models on a hub: what is downloaded of them, from a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_bundle
from hub_server import hub_server

from snapfusion.models.hub import needed_files
from snapfusion.models.load import load, load_sizes
from snapfusion.models.save import save

# What the repository of SD-v1.5 holds, and some files of fine-tunes.
NAMES = (
    *("README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt"),
    *("feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"),
    *("safety_checker/config.json", "safety_checker/model.safetensors", "safety_checker/pytorch_model.bin"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"),
    *("tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
)


def weights(names, variant=None):
    return [name for name in needed_files(names, variant=variant) if name.endswith((".safetensors", ".bin"))]


def test_one_variant_of_the_networks_alone_is_needed():
    assert weights(NAMES) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    # A network without the variant is read plain.
    assert weights(NAMES, "fp16") == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    described = set(needed_files(NAMES, variant=None)) - set(weights(NAMES))
    assert {"model_index.json", "tokenizer/merges.txt", "unet/config.json"} <= described
    assert not any(name.startswith(("README", "v1-5")) for name in described)


def test_all_parts_and_the_only_variant_are_needed():
    names = [f"unet/model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    assert weights([*names, "unet/model.safetensors.index.json"]) == names
    assert weights(["vae/model.fp16.safetensors"]) == ["vae/model.fp16.safetensors"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A hub with `me/tiny`, whose weights are there plain and as fp16."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "me/tiny"
    save(tiny_bundle(), folder, dtype=torch.float32)
    for path in list(folder.glob("*/*.safetensors")):
        path.with_suffix(".fp16.safetensors").write_bytes(path.read_bytes())
    (folder / "SHA256SUMS").unlink()
    return root


SCRIPT = """
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load, load_prediction_type, load_sizes
print(load_sizes("me/tiny").side, load_prediction_type("me/tiny"))
print(load("me/tiny?variant=fp16").fingerprint()["unet"])
try:
    load_sizes("me/other")
except ModelError as error:
    print(error)
"""


def run(tmp_path: Path, *, address: str) -> list[str]:
    environment = os.environ | {
        **{"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        **{"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    }
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_is_read_is_downloaded(repositories, tmp_path):
    with hub_server(repositories) as (address, fetched):
        sizes, _, missing = run(tmp_path, address=address)
        assert sizes == "16 epsilon"
        assert "'me/other' is neither a folder here nor a model the hub gave" in missing
        configs = ["scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
        assert sorted(fetched[:3]) == configs
        networks = [name for name in fetched if name.endswith(".safetensors")]
        assert len(networks) == 3
        assert all(name.endswith(".fp16.safetensors") for name in networks)


@pytest.mark.slow
def test_without_a_connection_the_cache_is_read(repositories, tmp_path):
    with hub_server(repositories) as (address, _):
        connected = run(tmp_path, address=address)
    assert run(tmp_path, address=address)[:2] == connected[:2]


def test_every_file_is_of_the_given_revision(repositories, monkeypatch):
    requests = []

    def snapshot_download(name, *, revision, allow_patterns):
        requests.append((name, revision))
        return str(repositories / name)

    def model_info(self, name, *, revision):
        requests.append((name, revision))
        files = (repositories / name).rglob("*")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=str(file)) for file in files])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert load_sizes("me/tiny?revision=v1").side == 16
    assert load("me/tiny?revision=v1").fingerprint() == tiny_bundle().fingerprint()
    assert {*requests} == {("me/tiny", "v1")}
    assert len(requests) == 4
