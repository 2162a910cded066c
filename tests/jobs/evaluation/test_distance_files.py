"""Distances are computed once for the same features, and again for others or from a damaged file."""

import numpy as np
import pytest
import torch

from jobs.evaluation.distance_files import DistanceFiles, RealImages
from snapfusion.metrics.curve_point import ImageDistances
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.kernel import KernelReference
from snapfusion.metrics.moments import Moments

GROUPING = ImageGroups.of(24, groups=3, draws=1)


def features_of(seed, rows=24):
    return np.random.default_rng(seed).standard_normal((rows, 5)).astype(np.float32)


def files(folder, *, real=0, kid=True):
    vectors = torch.from_numpy(features_of(real, rows=40))
    kernel = KernelReference.of(vectors) if kid else None
    images = RealImages(moments=Moments.of(vectors), kernel=kernel)
    return DistanceFiles(url=str(folder), real=images, parallel=map)


@pytest.fixture
def computed(monkeypatch):
    """The number of times that distances are computed."""
    calls, compute = [], ImageDistances.of
    monkeypatch.setattr(
        ImageDistances, "of", lambda *args, **options: calls.append(1) or compute(*args, **options)
    )
    return calls


@pytest.mark.parametrize("kid", [True, False])
def test_kept_distances_are_those_computed(tmp_path, computed, kid):
    first = files(tmp_path, kid=kid).distances(features_of(1), grouping=GROUPING)
    again = files(tmp_path, kid=kid).distances(features_of(1), grouping=GROUPING)
    assert len(computed) == 1
    assert again.frechet == first.frechet
    assert (again.kernel is None) == (not kid)
    if kid:
        assert again.kernel.distance([0, 2]) == first.kernel.distance([0, 2])


def test_other_images_have_distances_of_their_own(tmp_path, computed):
    files(tmp_path).distances(features_of(1), grouping=GROUPING)
    files(tmp_path).distances(features_of(2), grouping=GROUPING)
    files(tmp_path, real=9).distances(features_of(1), grouping=GROUPING)
    files(tmp_path, kid=False).distances(features_of(1), grouping=GROUPING)
    files(tmp_path).distances(features_of(1), grouping=ImageGroups.of(24, groups=4, draws=1))
    assert len(computed) == len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("content", ["", '{"frechet": [1.0]}', "[]", '{"frechet": null}'])
def test_a_damaged_file_is_computed_again(tmp_path, computed, content):
    first = files(tmp_path).distances(features_of(1), grouping=GROUPING)
    [path] = tmp_path.iterdir()
    path.write_text(content)
    assert files(tmp_path).distances(features_of(1), grouping=GROUPING).frechet == first.frechet
    assert len(computed) == 2
