"""Distances of subsets against those of the same images alone, by other means."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import scipy.linalg
import torch
from curve_costs import features_of as inception_like

from snapfusion.metrics import subset_distances as module
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.parallel import over_cores
from snapfusion.metrics.subset_distances import subset_distances

CURVE_COSTS = Path(__file__).with_name("curve_costs.py")


def features_of(rows, dimension, *, seed, mean=0.0):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((dimension, dimension)) / dimension**0.5
    return (mean + random.standard_normal((rows, dimension)) @ mixing).astype(np.float32)


def reference_of(rows, dimension, *, seed=0, mean=0.0):
    return Moments.of(torch.from_numpy(features_of(rows, dimension, seed=seed, mean=mean)))


@pytest.mark.parametrize(("groups", "draws"), [(6, 1), (2, 2), (2, 5)])
def test_subsets_have_the_distances_of_their_images(groups, draws, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 5)
    monkeypatch.setattr(module, "_ROWS", 11)
    features, reference = features_of(120, 12, seed=1, mean=0.5), reference_of(200, 12)
    grouping = ImageGroups.of(120, groups=groups, draws=draws)
    found = subset_distances(features, grouping=grouping, reference=reference, parallel=map)
    assert tuple(found) == grouping.subsets
    for subset, distance in found.items():
        rows = np.concatenate([grouping.members[group] for group in subset])
        alone = frechet_distance(Moments.of(torch.from_numpy(features[rows])), reference)
        assert distance == pytest.approx(alone, rel=1e-9)


def test_a_singular_reference_has_the_distances_too():
    features, reference = features_of(60, 12, seed=1), reference_of(8, 12)
    grouping = ImageGroups.of(60, groups=3, draws=1)
    found = subset_distances(features, grouping=grouping, reference=reference, parallel=map)
    whole = frechet_distance(Moments.of(torch.from_numpy(features)), reference)
    assert found[grouping.subsets[0]] == pytest.approx(whole, rel=1e-9)


def test_a_mean_far_from_zero_costs_no_digits():
    """Float32 features keep 7 digits of 1,000; sums of squares about zero would lose 6 more."""
    near, far = (features_of(90, 6, seed=1) + np.float32(mean) for mean in (0.0, 1024.0))
    grouping = ImageGroups.of(90, groups=3, draws=1)
    distances = [
        subset_distances(one, grouping=grouping, reference=reference_of(200, 6, mean=mean), parallel=map)[
            grouping.subsets[1]
        ]
        for one, mean in ((near, 0.0), (far, 1024.0))
    ]
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)


def test_cores_do_not_change_the_bits():
    features, reference = features_of(300, 40, seed=1), reference_of(200, 40)
    grouping = ImageGroups.of(300, groups=10, draws=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with over_cores() as parallel:
            assert torch.get_num_threads() == 1
            found = subset_distances(features, grouping=grouping, reference=reference, parallel=parallel)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == subset_distances(features, grouping=grouping, reference=reference, parallel=map)


def test_features_that_cannot_be_compared_are_refused():
    grouping = ImageGroups.of(20, groups=2, draws=1)
    features, reference = features_of(20, 4, seed=1), reference_of(20, 5)
    with pytest.raises(ValueError, match="features of 4 and of 5 numbers have no distance"):
        subset_distances(features, grouping=grouping, reference=reference, parallel=map)
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 20 feature vectors are not finite"):
        subset_distances(features, grouping=grouping, reference=reference_of(20, 4), parallel=map)


@pytest.mark.slow
def test_memory_does_not_grow_with_points(capsys):
    """At 30,000 images and 2,048 features, as `evaluate --recipe sd15` has them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peaks = []
    for points in (1, 3):
        command = [sys.executable, str(CURVE_COSTS), "--points", str(points)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout)
        peaks.append(figures["peak_mib"])
        with capsys.disabled():
            print("\n", figures)
    assert max(peaks) <= 2_048
    assert peaks[1] <= 1.03 * peaks[0]


@pytest.mark.slow
def test_one_distance_at_full_size_beside_the_others(capsys):
    """The reference's factor known, 5,000 images: the usual root of the product, and eigenvalues of it."""
    a, b = (Moments.of(torch.from_numpy(inception_like(seed, rows=5_000))) for seed in (1, 2))
    b.covariance_factor  # noqa: B018 - kept by the moments

    def by_root():  # as pytorch-fid does it
        root = scipy.linalg.sqrtm((a.covariance() @ b.covariance()).numpy()).real
        return spread_with(np.trace(root))

    def by_eigenvalues():  # as torchmetrics does it
        values = torch.linalg.eigvals(a.covariance() @ b.covariance())
        return spread_with(float(values.sqrt().real.sum()))

    def spread_with(overlap):
        spread = float(a.covariance().trace() + b.covariance().trace()) - 2.0 * overlap
        return float((a.mean - b.mean).square().sum()) + spread

    def seconds(compute):
        start = time.process_time()
        value = compute()
        return time.process_time() - start, value

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [
            [seconds(one) for one in (lambda: frechet_distance(a, b), by_root, by_eigenvalues)]
            for _ in range(3)
        ]
    finally:
        torch.set_num_threads(threads)
    ours, root, eigenvalues = (median(run[side][0] for run in runs) for side in range(3))
    with capsys.disabled():
        print(f"\nCPU s of one distance: {ours:.2f}; root {root:.2f}; eigenvalues {eigenvalues:.2f}")
    assert runs[0][0][1] == pytest.approx(runs[0][1][1], rel=1e-6)
    assert runs[0][0][1] == pytest.approx(runs[0][2][1], rel=1e-6)
    assert ours < root / 3
    assert ours < eigenvalues / 2
