"""LPIPS is the published formula over torchvision's features, whatever the number of pairs."""

from copy import deepcopy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from lpips_files import write_lpips
from torchvision.models.feature_extraction import create_feature_extractor

from snapfusion.metrics.lpips import load_lpips

LAYERS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
IMAGES = torch.randint(0, 256, (3, 3, 48, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def load_written(folder, network):
    files = write_lpips(folder, network)
    return load_lpips(network, backbone=Path(files["backbone"]), heads=Path(files["heads"]))


def expected_distances(lpips, network):
    """Eq. 1 of Zhang et al. in float64."""
    extract = create_feature_extractor(
        deepcopy(lpips.backbone.features).double(), [str(layer) for layer in LAYERS[network]]
    )
    mean, deviation = (
        np.array(values).reshape(1, 3, 1, 1) for values in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45])
    )
    pixels = (IMAGES.numpy() / 127.5 - 1 - mean) / deviation
    with torch.inference_mode():
        layers = [value.numpy() for value in extract(torch.from_numpy(pixels)).values()]
    heads = [value.double().numpy().ravel() for value in lpips.heads.state_dict().values()]
    distances = []
    for a, b in combinations(range(len(IMAGES)), 2):
        total = 0.0
        for features, head in zip(layers, heads, strict=True):
            unit = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-10)
            total += ((unit[a] - unit[b]) ** 2 * head[:, None, None]).sum(axis=0).mean()
        distances.append(total)
    return distances


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_distances_are_those_of_the_formula(tmp_path, network):
    lpips = load_written(tmp_path, network)
    found = lpips.pairwise(IMAGES)
    np.testing.assert_allclose(found.numpy(), expected_distances(lpips, network), rtol=1e-4)
    assert found.min() > 0.0


def test_equal_images_have_no_distance(tmp_path):
    lpips = load_written(tmp_path, "alex")
    assert lpips.pairwise(IMAGES[:1].repeat(3, 1, 1, 1)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("network", "side"), [("alex", 31), ("vgg", 16)])
def test_smaller_images_are_refused(tmp_path, network, side):
    lpips = load_written(tmp_path, network)
    assert torch.isfinite(lpips.pairwise(IMAGES[:, :, :side, :side])).all()
    with pytest.raises(ValueError, match=f"needs {side} a side"):
        lpips.pairwise(IMAGES[:, :, : side - 1, :side])
    with pytest.raises(ValueError, match="uint8"):
        lpips.pairwise(IMAGES.float())


def test_files_of_another_network_are_refused(tmp_path):
    alex, vgg = (write_lpips(tmp_path, network) for network in ("alex", "vgg"))
    with pytest.raises(ValueError, match="does not hold torchvision's alex"):
        load_lpips("alex", backbone=Path(vgg["backbone"]), heads=Path(alex["heads"]))
    with pytest.raises(ValueError, match="does not hold the heads of LPIPS for 'alex': size mismatch"):
        load_lpips("alex", backbone=Path(alex["backbone"]), heads=Path(vgg["heads"]))
