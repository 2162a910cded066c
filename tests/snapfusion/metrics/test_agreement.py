"""FID, KID, precision and recall beside torch-fidelity's; time beside torchmetrics and pytorch-fid.

These packages are not installed with the project:
pip install --no-deps torch-fidelity==0.4.0 torchmetrics==1.9.0 pytorch-fid==0.3.0 lightning-utilities
"""

import time
from statistics import median

import numpy as np
import pytest
import torch
from curve_costs import features_of

from snapfusion.metrics import neighbors
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NeighborReference


@pytest.fixture(scope="module")
def sides():
    random = np.random.default_rng(0)
    real = torch.from_numpy(random.standard_normal((1500, 64))).float()
    return torch.from_numpy(0.9 * random.standard_normal((1200, 64)) + 0.1).float(), real


def test_fid_is_torch_fidelitys(sides):
    package = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = [
        {"mu": side.double().numpy().mean(0), "sigma": np.cov(side.double().numpy(), rowvar=False)}
        for side in sides
    ]
    [expected] = package.fid_statistics_to_metric(*statistics, False).values()
    assert frechet_distance(*map(Moments.of, sides)) == pytest.approx(expected, rel=1e-9)


def test_kid_of_one_subset_is_torch_fidelitys(sides):
    package = pytest.importorskip("torch_fidelity.metric_kid")
    generated, real = (side[:1000] for side in sides)
    kernels = [
        package.kernel_poly(
            a.double().numpy(),
            b.double().numpy(),
            kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None,
            kid_kernel_poly_coef0=1,
        )
        for a, b in ((generated, generated), (generated, real), (real, real))
    ]
    sums = KernelSums.of(generated, groups=[np.arange(1000)], reference=KernelReference.of(real))
    assert sums.distance([0]) == pytest.approx(package.mmd2(*kernels), rel=1e-9)


@pytest.mark.parametrize("count", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(sides, count, monkeypatch):
    package = pytest.importorskip("torch_fidelity.metric_prc")
    monkeypatch.setattr(neighbors, "NEIGHBORS", count)
    generated, real = sides
    found = NeighborReference.of(real).compare(generated)
    expected = package.calculate_precision_recall_full(generated, real, count, 500)
    assert (found["precision"].value, found["recall"].value) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_one_distance_beside_torchmetrics_and_pytorch_fid(capsys):
    """At 2,048 features and 5,000 images with a known reference, in CPU seconds of one thread, in turns."""
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score")
    a, b = (Moments.of(torch.from_numpy(features_of(seed, rows=5_000))) for seed in (1, 2))
    parts = (a.mean, a.covariance(), b.mean, b.covariance())
    arrays = tuple(part.numpy() for part in parts)
    b.covariance_factor  # noqa: B018 - kept by the moments
    sides = {
        "ours": lambda: frechet_distance(a, b),
        "torchmetrics": lambda: float(torchmetrics._compute_fid(*parts)),
        "pytorch-fid": lambda: float(pytorch_fid.calculate_frechet_distance(*arrays)),
    }
    seconds, values, threads = {name: [] for name in sides}, {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(5):
        for name, compute in sides.items():
            start = time.process_time()
            values[name] = compute()
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    medians = {name: median(times) for name, times in seconds.items()}
    with capsys.disabled():
        print(f"\nCPU s of one distance, median of 5: {medians}")
    assert list(values.values()) == pytest.approx([values["ours"]] * 3, rel=1e-6)
    assert medians["torchmetrics"] > 3.5 * medians["ours"]
    assert medians["pytorch-fid"] > 8.0 * medians["ours"]
