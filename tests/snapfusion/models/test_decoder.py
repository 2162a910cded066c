"""The half-width decoder: initial weights, size, folders that load or fail."""

import hashlib
import json

import pytest
import torch
from damaged_files import flip_byte
from diffusers import AutoencoderKL
from safetensors.torch import save

from snapfusion.models.decoder import DecoderConfig, DecoderError, HalfDecoder, load_decoder


def small_vae(**changes):
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.4,
        "sample_size": 32,
    }
    torch.manual_seed(3)
    return AutoencoderKL(**{**settings, **changes}).eval()


def test_parameters_of_sd15():
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            scaling_factor=0.18215,
        )
        half = HalfDecoder(DecoderConfig.half_of(vae))
    post_quant = sum(p.numel() for p in vae.post_quant_conv.parameters())
    full = sum(p.numel() for p in vae.decoder.parameters())
    assert (full, half.num_parameters - post_quant, post_quant) == (49_490_179, 12_387_459, 20)


def test_leading_half_of_every_tensor_is_kept():
    vae = small_vae()
    half = HalfDecoder.from_vae(vae)
    full = vae.decoder.state_dict()
    for name, tensor in half.decoder.state_dict().items():
        corner = full[name]
        for dimension, size in enumerate(tensor.shape):
            kept_whole = size in (3, 4) and corner.shape[dimension] == size
            assert kept_whole or corner.shape[dimension] == 2 * size or dimension >= 2
            corner = corner.narrow(dimension, 0, size)
        assert torch.equal(tensor, corner)
    assert torch.equal(half.post_quant_conv.weight, vae.post_quant_conv.weight)


def test_half_equals_full_without_trailing_channels():
    """Without weights from trailing to leading channels, the latter do not depend on the former."""
    vae = small_vae(mid_block_add_attention=False)
    half = HalfDecoder.from_vae(vae)
    for name, tensor in vae.decoder.state_dict().items():
        kept = half.decoder.state_dict()[name].shape
        if tensor.dim() > 1 and tensor.shape[1] != kept[1]:
            tensor[: kept[0], kept[1] :] = 0.0  # in place: the state dict shares its memory
    latent = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        expected = vae.decode(latent / vae.config.scaling_factor).sample
        torch.testing.assert_close(half(latent), expected, rtol=1e-4, atol=1e-5)


def test_random_initialization_follows_its_seed():
    vae = small_vae()
    before = torch.get_rng_state()
    first, again, other = (HalfDecoder.from_vae(vae, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.decoder.conv_in.weight, again.decoder.conv_in.weight)
    assert not torch.equal(first.decoder.conv_in.weight, other.decoder.conv_in.weight)
    assert not torch.equal(first.decoder.conv_in.weight, HalfDecoder.from_vae(vae).decoder.conv_in.weight)


def test_decode_clamps():
    image = HalfDecoder.from_vae(small_vae()).decode(30.0 * torch.randn(2, 4, 8, 8))
    assert image.shape == (2, 3, 32, 32)
    assert float(image.abs().max()) <= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8, 15, 24), "norm_num_groups": 1}, "must be even"),
        ({"act_fn": "gelu"}, "gelu"),
        ({"shift_factor": 0.1}, "shift factor"),
    ],
)
def test_vae_that_cannot_be_halved_fails(changes, message):
    with pytest.raises(ValueError, match=message):
        HalfDecoder.from_vae(small_vae(**changes))


@pytest.fixture
def folder(tmp_path):
    HalfDecoder.from_vae(small_vae()).save(str(tmp_path / "decoder"))
    return tmp_path / "decoder"


def test_saved_decoder_loads(folder):
    latent = torch.randn(1, 4, 8, 8)
    loaded = load_decoder(str(folder))
    assert torch.equal(loaded.decode(latent), HalfDecoder.from_vae(small_vae()).decode(latent))
    assert not loaded.training


def test_object_store_url_of_a_decoder():
    hashes = HalfDecoder.from_vae(small_vae()).save("memory://bucket/decoder")
    assert set(hashes) == {"config.json", "decoder.safetensors"}
    assert load_decoder("memory://bucket/decoder").config.scaling_factor == 0.4


def config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def weights(content):
    """Replaces the weights, with their checksum."""

    def change(folder):
        (folder / "decoder.safetensors").write_bytes(content)
        config(weights_sha256=hashlib.sha256(content).hexdigest())(folder)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_byte(folder / "decoder.safetensors"), "was altered"),
        (lambda folder: (folder / "decoder.safetensors").unlink(), "has no decoder.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": '), "is damaged"),
        (config(_class_name="AutoencoderKL"), "describes a AutoencoderKL"),
        (config(block_out_channels=[8, 8, 12]), "size mismatch"),
        (config(wings=2), "wings: no such setting"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04"), "pytorch_model.bin"),
        (weights(save({"x": torch.zeros(1)})), "Missing key"),
        (weights(b"junk"), "does not hold a decoder that fits"),
    ],
)
def test_damaged_folder_fails(folder, damage, message):
    damage(folder)
    with pytest.raises(DecoderError, match=message):
        load_decoder(str(folder))


def test_missing_folder_fails(tmp_path):
    with pytest.raises(DecoderError, match="does not exist"):
        load_decoder(str(tmp_path / "nowhere"))
