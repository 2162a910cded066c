"""Distances of subsets against those of the same images alone, by other means."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
    assert peaks[1] <= 1.05 * peaks[0]
