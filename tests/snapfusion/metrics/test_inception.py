"""Inception's pooling, input and weights file; its features need the published weights."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torchvision.models.inception import InceptionA

from snapfusion.metrics.inception import Inception, _BlockA, _LastBlock, load_inception
from snapfusion.metrics.settings import INCEPTION_FEATURES


def test_features_of_images_of_any_size(tmp_path):
    torch.manual_seed(0)
    inception = Inception()
    tensors = {**inception.network.state_dict(), "fc.weight": torch.zeros(1008, 2048)}
    save_file(tensors, tmp_path / "inception.safetensors")
    loaded = load_inception(tmp_path / "inception.safetensors")
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.inference_mode():
        features = loaded(images)
    assert features.shape == (2, INCEPTION_FEATURES)
    assert torch.equal(features, inception(images).detach())


def test_average_pooling_ignores_the_padding():
    """Of ones, border averages are one; torchvision's are 4/9."""
    torch.manual_seed(0)
    block = _BlockA(8, pool_features=4).eval()
    plain = InceptionA(8, pool_features=4).eval()
    plain.load_state_dict(block.state_dict())
    x = torch.ones(1, 8, 5, 5)
    assert torch.equal(block(x)[:, -4:], block.branch_pool(x))
    assert not torch.allclose(plain(x)[:, -4:], block.branch_pool(x))
    assert torch.equal(plain(x)[:, :-4], block(x)[:, :-4])


def test_the_last_block_uses_maximum_pooling():
    torch.manual_seed(0)
    block, x = _LastBlock(16).eval(), torch.randn(1, 16, 4, 4)
    expected = block.branch_pool(functional.max_pool2d(x, 3, stride=1, padding=1))
    assert torch.equal(block(x)[:, -192:], expected)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_input_spans_minus_one_to_one(resize):
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 512, 512)
    prepared = Inception.prepare(SimpleNamespace(resize=resize), images)
    assert prepared.shape == (2, 3, 299, 299)
    assert (prepared[0] == -1).all()
    torch.testing.assert_close(prepared[1], torch.ones(3, 299, 299))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pickled weights are never opened"):
        load_inception(tmp_path / "inception.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold this Inception: Missing key"):
        load_inception(tmp_path / "other.safetensors")
