"""FID, KID, precision, recall and LPIPS beside other packages': equal digits, and CPU time.

The packages are installed into a folder of their own, without what they require: that is installed here.
"""

import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from curve_costs import features_of
from lpips_files import write_lpips
from safetensors.torch import load_file, save_file

from snapfusion.metrics import neighbors
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.lpips import load_lpips
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NeighborReference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PACKAGES = (
    *("torch-fidelity==0.4.0", "torchmetrics==1.9.0", "lightning-utilities==0.15.3"),
    *("pytorch-fid==0.3.0", "lpips==0.1.4"),
)
TURNS = 5


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory):
    """The other packages, which can be imported while this file's tests run."""
    folder = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, *PACKAGES], check=True)
    with pytest.MonkeyPatch.context() as patch:
        # At the end: nothing that is installed here is replaced.
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield


@pytest.fixture(scope="module")
def sides():
    random = np.random.default_rng(0)
    real = torch.from_numpy(random.standard_normal((1500, 64))).float()
    return torch.from_numpy(0.9 * random.standard_normal((1200, 64)) + 0.1).float(), real


def test_fid_is_torch_fidelitys(sides):
    from torch_fidelity import metric_fid

    statistics = [
        {"mu": side.double().numpy().mean(0), "sigma": np.cov(side.double().numpy(), rowvar=False)}
        for side in sides
    ]
    [expected] = metric_fid.fid_statistics_to_metric(*statistics, False).values()
    assert frechet_distance(*map(Moments.of, sides)) == pytest.approx(expected, rel=1e-9)


def test_kid_of_one_subset_is_torch_fidelitys(sides):
    from torch_fidelity import metric_kid

    generated, real = (side[:1000] for side in sides)
    kernels = [
        metric_kid.kernel_poly(
            a.double().numpy(),
            b.double().numpy(),
            kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None,
            kid_kernel_poly_coef0=1,
        )
        for a, b in ((generated, generated), (generated, real), (real, real))
    ]
    sums = KernelSums.of(generated, groups=[np.arange(1000)], reference=KernelReference.of(real))
    assert sums.distance([0]) == pytest.approx(metric_kid.mmd2(*kernels), rel=1e-9)


@pytest.mark.parametrize("count", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(sides, count, monkeypatch):
    from torch_fidelity import metric_prc

    monkeypatch.setattr(neighbors, "NEIGHBORS", count)
    generated, real = sides
    found = NeighborReference.of(real).compare(generated)
    expected = metric_prc.calculate_precision_recall_full(generated, real, count, 500)
    assert (found["precision"].value, found["recall"].value) == pytest.approx(expected, abs=1e-4)


def cpu_seconds(sides, capsys, *, title):
    """Median CPU seconds of one thread of each function by its name, in turns; and what each returns."""
    seconds, values, threads = {name: [] for name in sides}, {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(TURNS):
        for name, compute in sides.items():
            start = time.process_time()
            values[name] = compute()
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    medians = {name: median(times) for name, times in seconds.items()}
    with capsys.disabled():
        print(f"\nCPU s of {title}, median of {TURNS}: {medians}")
    return medians, values


def test_one_distance_beside_torchmetrics_and_pytorch_fid(capsys):
    """At 2,048 features and 5,000 images with a known reference."""
    from pytorch_fid import fid_score
    from torchmetrics.image import fid

    a, b = (Moments.of(torch.from_numpy(features_of(seed, rows=5_000))) for seed in (1, 2))
    parts = (a.mean, a.covariance(), b.mean, b.covariance())
    arrays = tuple(part.numpy() for part in parts)
    b.covariance_factor  # noqa: B018 - kept by the moments
    sides = {
        "ours": lambda: frechet_distance(a, b),
        "torchmetrics": lambda: float(fid._compute_fid(*parts)),
        "pytorch-fid": lambda: float(fid_score.calculate_frechet_distance(*arrays)),
    }
    medians, values = cpu_seconds(sides, capsys, title="one distance")
    assert list(values.values()) == pytest.approx([values["ours"]] * 3, rel=1e-6)
    assert medians["torchmetrics"] > 3.5 * medians["ours"]
    assert medians["pytorch-fid"] > 8.0 * medians["ours"]


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_of_a_caption_beside_lpips_and_torchmetrics(tmp_path, capsys, network):
    """All pairs of five images of 128 px; a random backbone, and the heads that the authors published."""
    import lpips
    from torchmetrics.functional.image.lpips import _LPIPS

    backbone, heads = Path(write_lpips(tmp_path, network)["backbone"]), tmp_path / "heads.safetensors"
    published = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{network}.pth"
    save_file(torch.load(published, map_location="cpu", weights_only=True), heads)
    ours = load_lpips(network, backbone=backbone, heads=heads)
    random = {"net": network, "pretrained": False, "pnet_rand": True}
    others = {"lpips": lpips.LPIPS(verbose=False, **random), "torchmetrics": _LPIPS(**random)}
    weights, features = load_file(heads), load_file(backbone)
    for other in others.values():
        slices = {key: key.partition(".")[2] for key in other.net.state_dict()}
        other.net.load_state_dict({key: features[f"features.{name}"] for key, name in slices.items()})
        other.load_state_dict(weights, strict=False)
        assert all(torch.equal(other.state_dict()[key], value) for key, value in weights.items())
    images = torch.randint(0, 256, (5, 3, 128, 128), dtype=torch.uint8)
    left, right = (images[list(side)] / 127.5 - 1 for side in zip(*combinations(range(5), 2), strict=True))

    def pairs_of(other):
        with torch.inference_mode():
            return other(left, right).flatten()

    sides = {"ours": lambda: ours.pairwise(images)}
    sides |= {name: lambda other=other: pairs_of(other) for name, other in others.items()}
    medians, values = cpu_seconds(sides, capsys, title=f"LPIPS of five images by {network}")
    for name in others:
        torch.testing.assert_close(values["ours"], values[name], rtol=1e-4, atol=1e-6)
        assert medians[name] > 2.0 * medians["ours"]
