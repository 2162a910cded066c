"""Readings of FID-CLIP curves, on curves whose answer is known."""

import numpy as np
import pytest
import torch

from snapfusion.metrics.curves import (
    Curve,
    CurvePoint,
    IncomparableCurvesError,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.moments import Moments

ROWS, GROUPS = 400, 8
REAL = Moments.of(torch.randn(2000, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def point(w, *, shift, clip, seed=0, right=None):
    """Pictures whose features are as the real ones, moved by `shift`: their FID is about shift^2."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((ROWS, 3)).astype(np.float32)
    features[:, 0] += shift
    spread = 0.05 * np.random.default_rng(1).standard_normal(
        ROWS
    )  # the captions' own, the same for all models
    noise = 0.002 * random.standard_normal(ROWS)
    return CurvePoint.of(w=w, features=features, clip=clip + spread + noise, right=right, groups=GROUPS)


def curve(shifts, clips, *, seed=0):
    points = (
        point(1.0 + n, shift=shift, clip=clip, seed=seed + n)
        for n, (shift, clip) in enumerate(zip(shifts, clips, strict=True))
    )
    return Curve(points=tuple(points), reference=REAL)


def test_figures_are_those_of_all_pictures():
    right = np.array([[1, 1], [1, 0]] * (ROWS // 2), dtype=np.uint8)
    single = Curve(points=(point(2.0, shift=1.0, clip=0.3, seed=1, right=right),), reference=REAL)
    features = np.random.default_rng(1).standard_normal((ROWS, 3)).astype(np.float32)
    features[:, 0] += 1.0
    told = metrics_at(single, 2.0)
    assert told["fid"].value == pytest.approx(
        frechet_distance(Moments.of(torch.from_numpy(features)), REAL), rel=1e-9
    )
    drawn_from = Moments(
        count=2, mean=torch.tensor([1.0, 0, 0]).double(), scatter=torch.eye(3, dtype=torch.float64)
    )
    assert told["fid"].low < frechet_distance(drawn_from, REAL) < told["fid"].high
    assert told["clip"].value == pytest.approx(single.points[0].clip.mean())
    assert told["attributes"].value == pytest.approx(0.75)
    assert told["all_attributes"].value == pytest.approx(0.5)


def test_a_difference_is_paired_by_caption():
    """Captions differ by 0.05, the models by 0.01: unpaired, the interval would hide it."""
    ours, theirs = curve([1.0], [0.31], seed=5), curve([1.0], [0.30], seed=50)
    difference = paired_differences(ours, theirs, w=1.0)["clip"]
    assert difference.value == pytest.approx(0.01, abs=0.001)
    assert 0.009 < difference.low < difference.high < 0.011
    unpaired = metrics_at(ours, 1.0)["clip"]
    assert unpaired.high - unpaired.low > 5 * (difference.high - difference.low)


def test_a_model_does_not_differ_from_itself():
    same = curve([1.0, 2.0], [0.2, 0.3])
    for told in paired_differences(same, same, w=2.0).values():
        assert told == (0.0, 0.0, 0.0)
    assert clip_at_equal_fid(same, same).clip == (0.0, 0.0, 0.0)


def test_clip_at_equal_fid_is_read_where_both_rise():
    """FID falls to its least value at w = 2 and rises from there; ours has 0.02 more CLIP at any FID."""
    shifts, clips = [1.5, 0.5, 1.0, 2.0, 3.0], np.array([0.10, 0.20, 0.24, 0.32, 0.40])
    reading = clip_at_equal_fid(curve(shifts, clips + 0.02), curve(shifts, clips))
    assert reading.clip.value == pytest.approx(0.02, abs=0.002)
    assert reading.clip.low > 0.015
    assert reading.fid_low == pytest.approx(0.25, abs=0.15)
    assert reading.fid_high == pytest.approx(9.0, rel=0.1)


def test_a_shift_along_the_same_curve_is_no_difference():
    """Two ranges on one line of CLIP over FID: figures at equal guidance differ, the reading does not."""
    base = np.array([0.5, 1.0, 1.5, 2.0])
    ours, theirs = (curve(np.sqrt(fid), 0.1 + 0.05 * fid) for fid in ((base * 1.2) ** 2, base**2))
    assert paired_differences(ours, theirs, w=4.0)["clip"].value > 0.05
    assert abs(clip_at_equal_fid(ours, theirs).clip.value) < 0.01


def test_curves_without_a_common_fid_have_no_reading():
    near, far = curve([0.5, 1.0], [0.1, 0.2]), curve([3.0, 4.0], [0.1, 0.2])
    with pytest.raises(IncomparableCurvesError, match="no FID in common"):
        clip_at_equal_fid(near, far)
    falling = curve([2.0, 1.0], [0.1, 0.2])
    with pytest.raises(IncomparableCurvesError, match="does not rise"):
        clip_at_equal_fid(falling, near)


def test_the_share_of_a_gap():
    few, student, many = (curve([shift], [0.3], seed=3) for shift in (2.0, 1.0, 0.0))
    closed = gap_closed(student, few=few, many=many, w=1.0)
    assert closed.value == pytest.approx(0.75, abs=0.05)
    assert 0.5 < closed.low < closed.value < closed.high < 1.0
    with pytest.raises(IncomparableCurvesError, match="no gap to close"):
        gap_closed(student, few=many, many=few, w=1.0)


def test_guidance_that_was_not_drawn_is_named():
    with pytest.raises(IncomparableCurvesError, match="guidance 7 was not drawn; 1, 2 were"):
        metrics_at(curve([1.0, 2.0], [0.2, 0.3]), 7.0)
    with pytest.raises(ValueError, match="guidance must rise"):
        Curve(points=tuple(reversed(curve([1.0, 2.0], [0.2, 0.3]).points)), reference=REAL)
