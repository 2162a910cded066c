"""Precision, recall, density and coverage against their definitions, image by image."""

import numpy as np
import pytest
import torch

from snapfusion.metrics.neighbors import NEIGHBORS, NeighborReference, spread_within


def features(count, *, seed, shift=0.0, spread=1.0, dimension=6):
    random = np.random.default_rng(seed)
    return torch.from_numpy(shift + spread * random.standard_normal((count, dimension))).float()


def by_definition(generated, real):
    """The sums of Naeem et al. 2020, Eq. 1 to 6, in loops."""
    generated, real = generated.double().numpy(), real.double().numpy()

    def radii(points):
        distances = [sorted(np.linalg.norm(point - other) for other in points) for point in points]
        return [row[NEIGHBORS] for row in distances]  # the first is the point itself

    spheres, own = radii(real), radii(generated)
    inside = np.array([[np.linalg.norm(g - r) <= spheres[j] for j, r in enumerate(real)] for g in generated])
    near = [any(np.linalg.norm(g - r) <= own[i] for i, g in enumerate(generated)) for r in real]
    return {
        "precision": inside.any(axis=1).mean(),
        "recall": np.mean(near),
        "density": inside.sum() / (NEIGHBORS * len(generated)),
        "coverage": inside.any(axis=0).mean(),
    }


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 1.0), (0.5, 0.4), (0.0, 2.0), (9.0, 1.0)])
def test_metrics_are_those_of_the_definition(shift, spread, monkeypatch):
    monkeypatch.setattr("snapfusion.metrics.neighbors._BLOCK", 13)
    real, generated = features(60, seed=0), features(45, seed=1, shift=shift, spread=spread)
    found = NeighborReference.of(real).compare(generated)
    expected = by_definition(generated, real)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(interval.low <= interval.value <= interval.high for interval in found.values())


def test_a_narrow_model_has_precision_without_recall():
    real = features(300, seed=0)
    narrow = NeighborReference.of(real).compare(features(300, seed=1, spread=0.2))
    wide = NeighborReference.of(real).compare(features(300, seed=1, spread=3.0))
    assert narrow["precision"].low > 0.9 > 0.5 > narrow["recall"].high
    assert wide["recall"].low > 0.9 > 0.5 > wide["precision"].high


def test_equal_images_have_every_neighbour():
    real = features(40, seed=0)
    same = NeighborReference.of(real).compare(real)
    assert [same[name].value for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]


def test_spread_is_the_variance_over_draws():
    captions, draws = 30, 4
    fixed, moved = features(captions, seed=0, spread=9.0), features(captions * draws, seed=1, spread=0.5)
    images = fixed.repeat(draws, 1) + moved
    found = spread_within(images, draws=draws)
    parts = images.double().numpy().reshape(draws, captions, 6)
    assert found.value == pytest.approx(np.var(parts, axis=0, ddof=1).sum(axis=1).mean(), rel=1e-12)
    assert found.low < 6 * 0.25 < found.high
    assert spread_within(fixed.repeat(draws, 1), draws=draws).value == 0.0


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="5 images have no 5 neighbours each; at least 6"):
        NeighborReference.of(features(5, seed=0))
    real = NeighborReference.of(features(20, seed=0))
    with pytest.raises(ValueError, match="features of 4 and of 6 numbers"):
        real.compare(features(20, seed=0, dimension=4))
