"""Comparisons of synthetic FID-CLIP curves with known results."""

import numpy as np
import pytest
import torch

from snapfusion.metrics.curve_point import CurvePoint, ImageDistances
from snapfusion.metrics.curves import (
    Curve,
    CurveError,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments
from snapfusion.mini.measure import held_out_batches
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import image_batch
from snapfusion.mini.weights import WEIGHTS

ROWS, GROUPS = 400, 8
REAL = Moments.of(torch.randn(2000, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def curve_point(w, features, *, clip, groups, right=None, draws=1, reference=REAL, kernel=None):
    grouping = ImageGroups.of(len(features), groups=groups, draws=draws)
    distances = ImageDistances.of(features, grouping=grouping, reference=reference, kernel=kernel)
    return CurvePoint(w=w, distances=distances, clip=clip, right=right, grouping=grouping)


def point(w, *, shift, clip, seed=0, right=None):
    """Images with the real ones' features shifted by `shift`: their FID is about shift^2."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((ROWS, 3)).astype(np.float32)
    features[:, 0] += shift
    # The captions' own spread is the same for all models.
    spread = 0.05 * np.random.default_rng(1).standard_normal(ROWS)
    scores = clip + spread + 0.002 * random.standard_normal(ROWS)
    return curve_point(w, features, clip=scores, right=right, groups=GROUPS)


def curve(shifts, clips, *, seed=0):
    pairs = enumerate(zip(shifts, clips, strict=True))
    points = (point(1.0 + n, shift=shift, clip=clip, seed=seed + n) for n, (shift, clip) in pairs)
    return Curve(points=tuple(points))


def test_metrics_are_of_all_images():
    right = np.array([[1, 1], [1, 0]] * (ROWS // 2), dtype=np.uint8)
    single = Curve(points=(point(2.0, shift=1.0, clip=0.3, seed=1, right=right),))
    features = np.random.default_rng(1).standard_normal((ROWS, 3)).astype(np.float32)
    features[:, 0] += 1.0
    metrics = metrics_at(single, 2.0)
    fid = frechet_distance(Moments.of(torch.from_numpy(features)), REAL)
    assert metrics["fid"].value == pytest.approx(fid, rel=1e-9)
    distribution = Moments(
        count=2, mean=torch.tensor([1.0, 0, 0]).double(), scatter=torch.eye(3, dtype=torch.float64)
    )
    assert metrics["fid"].low < frechet_distance(distribution, REAL) < metrics["fid"].high
    assert metrics["clip"].value == pytest.approx(single.points[0].clip.mean())
    assert metrics["attributes"].value == pytest.approx(0.75)
    assert metrics["all_attributes"].value == pytest.approx(0.5)


def test_differences_are_paired_by_caption():
    """Captions differ by 0.05 and models by 0.01, which an unpaired interval would hide."""
    ours, theirs = curve([1.0], [0.31], seed=5), curve([1.0], [0.30], seed=50)
    difference = paired_differences(ours, theirs, w=1.0)["clip"]
    assert difference.value == pytest.approx(0.01, abs=0.001)
    assert 0.009 < difference.low < difference.high < 0.011
    unpaired = metrics_at(ours, 1.0)["clip"]
    assert unpaired.high - unpaired.low > 5 * (difference.high - difference.low)


def test_a_model_does_not_differ_from_itself():
    same = curve([1.0, 2.0], [0.2, 0.3])
    assert set(paired_differences(same, same, w=2.0).values()) == {(0.0, 0.0, 0.0)}
    assert clip_at_equal_fid(same, same).clip == (0.0, 0.0, 0.0)


def test_clip_at_equal_fid_uses_the_rising_branch():
    """FID has its minimum at w = 2; `ours` has 0.02 more CLIP at any FID."""
    shifts, clips = [1.5, 0.5, 1.0, 2.0, 3.0], np.array([0.10, 0.20, 0.24, 0.32, 0.40])
    comparison = clip_at_equal_fid(curve(shifts, clips + 0.02), curve(shifts, clips))
    assert comparison.clip.value == pytest.approx(0.02, abs=0.002)
    assert comparison.clip.low > 0.015
    assert comparison.fid_low == pytest.approx(0.25, abs=0.15)
    assert comparison.fid_high == pytest.approx(9.0, rel=0.1)


def test_two_ranges_of_one_curve_are_equal():
    """They differ at equal guidance, but not at equal FID."""
    base = np.array([0.5, 1.0, 1.5, 2.0])
    ours, theirs = (curve(np.sqrt(fid), 0.1 + 0.05 * fid) for fid in ((base * 1.2) ** 2, base**2))
    assert paired_differences(ours, theirs, w=4.0)["clip"].value > 0.05
    assert abs(clip_at_equal_fid(ours, theirs).clip.value) < 0.01


def test_curves_without_a_common_fid_are_refused():
    near, far = curve([0.5, 1.0], [0.1, 0.2]), curve([3.0, 4.0], [0.1, 0.2])
    with pytest.raises(CurveError, match="no FID in common"):
        clip_at_equal_fid(near, far)
    falling = curve([2.0, 1.0], [0.1, 0.2])
    with pytest.raises(CurveError, match="does not rise"):
        clip_at_equal_fid(falling, near)


def test_gap_closed_is_a_ratio_of_fids():
    few, student, many = (curve([shift], [0.3], seed=3) for shift in (2.0, 1.0, 0.0))
    closed = gap_closed(student, few=few, many=many, w=1.0)
    assert closed.value == pytest.approx(0.75, abs=0.05)
    assert 0.5 < closed.low < closed.value < closed.high < 1.0
    with pytest.raises(CurveError, match="no gap to close"):
        gap_closed(student, few=many, many=few, w=1.0)


def test_missing_and_unsorted_guidance_is_refused():
    with pytest.raises(CurveError, match="guidance 7; 1, 2"):
        metrics_at(curve([1.0, 2.0], [0.2, 0.3]), 7.0)
    with pytest.raises(ValueError, match="guidance must increase"):
        Curve(points=tuple(reversed(curve([1.0, 2.0], [0.2, 0.3]).points)))


def sampled(features, captions, *, draws, seed):
    """Images whose captions have fixed features, and draws vary around them, float32 [N,D]."""
    random = np.random.default_rng(seed)
    images = np.tile(captions, (draws, 1)) + random.standard_normal((draws * len(captions), features))
    return images.astype(np.float32)


def curve_of(images, *, draws, reference):
    """A curve of one point of features that has no scores."""
    point = curve_point(1.0, images, clip=np.zeros(len(images)), groups=2, draws=draws, reference=reference)
    return Curve(points=(point,))


@pytest.mark.slow
def test_intervals_over_draws_hold_zero_for_equal_models():
    """The 95 % interval of the difference of two sets from one distribution holds zero in 92 to 98 %."""
    dimension, draws = 8, 5
    captions = 3.0 * np.random.default_rng(0).standard_normal((60, dimension))
    reference = Moments.of(torch.from_numpy(sampled(dimension, captions, draws=60, seed=1)))

    def holds(number):
        ours, theirs = (
            curve_of(
                sampled(dimension, captions, draws=draws, seed=2 * number + side),
                draws=draws,
                reference=reference,
            )
            for side in (100, 101)
        )
        difference = paired_differences(ours, theirs, w=1.0)["fid"]
        return difference.low <= 0.0 <= difference.high

    assert 0.92 <= np.mean([holds(number) for number in range(200)]) <= 0.98


def test_kid_uses_no_more_images_than_there_are_real_ones():
    features = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    reference = KernelReference.of(torch.from_numpy(features[:12] + 1.0))
    real = Moments.of(reference.features)
    kernel = curve_point(
        1.0, features, clip=np.zeros(60), groups=3, reference=real, kernel=reference
    ).distances.kernel
    assert kernel.counts == (4, 4, 4)
    first = np.concatenate([features[start : start + 4] for start in (0, 20, 40)])
    whole = KernelSums.of(torch.from_numpy(first), groups=[np.arange(12)], reference=reference)
    assert kernel.distance([0, 1, 2]) == pytest.approx(whole.distance([0]), rel=1e-9)


@pytest.mark.slow
def test_intervals_hold_zero_for_sets_of_real_images(capsys):
    """As above, with the miniature's scenes and the oracle's features, as an evaluation has them."""
    captions, draws = 240, 5
    batches = held_out_batches(160 * captions, batch=120, split="test")
    oracle = load_oracle(WEIGHTS / "oracle")
    with torch.inference_mode():
        features = torch.cat([oracle.features(image_batch(batch)) for batch in batches]).view(
            160, captions, -1
        )
    reference, pool = Moments.of(features[:84].flatten(0, 1)), features[84:].numpy()
    random = np.random.default_rng(0)

    def holds():
        both = random.permuted(np.arange(len(pool))[:, None].repeat(captions, 1), axis=0)[: 2 * draws]
        images = pool[both, np.arange(captions)]
        ours, theirs = (
            curve_of(half.reshape(draws * captions, -1), draws=draws, reference=reference)
            for half in (images[:draws], images[draws:])
        )
        difference = paired_differences(ours, theirs, w=1.0)["fid"]
        return difference.low <= 0.0 <= difference.high

    share = np.mean([holds() for _ in range(200)])
    with capsys.disabled():
        print(f"\nthe interval of the difference of two sets of real images holds zero in {share:.1%} of 200")
    assert 0.92 <= share <= 0.98
