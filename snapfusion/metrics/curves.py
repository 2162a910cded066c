"""FID and CLIP of a model over guidance scales, and how two models compare. SnapFusion Sec. 5, Fig. 4 and 6.

All models draw the same captions from the same noise, so differences are paired: their intervals come from
what the two differ in, not from how captions differ. Figures that are no mean over captions have intervals by
leaving out one group of captions at a time, from both models at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np
import torch

from snapfusion.metrics import intervals
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.moments import Moments

_NUM_LEVELS = 50
"""At how many FIDs two curves are compared."""

GroupIndices = Sequence[int]
"""Which groups of captions a figure is of."""


class IncomparableCurvesError(ValueError):
    """A comparison that the curves do not allow; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """One model's pictures at one guidance.

    Attributes:
        w: guidance scale of SnapFusion Eq. 3.
        moments: of the features, one for each group of captions.
        clip: cosine of each picture with its caption, float64 [n], in order of the captions.
        right: which attributes are as the caption says, 0 or 1 [n,A]; None where no oracle read them.
        groups: for each group the positions of its captions.
    """

    w: float
    moments: tuple[Moments, ...]
    clip: np.ndarray
    right: np.ndarray | None
    groups: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls, *, w: float, features: np.ndarray, clip: np.ndarray, right: np.ndarray | None, groups: int
    ) -> CurvePoint:
        """A point of features float32 [n,D] and figures of n pictures, cut into `groups` neighbourhoods.

        Raises:
            ValueError: unless there are two groups or more, and two pictures or more for each.
        """
        if groups < 2 or len(clip) < 2 * groups:
            raise ValueError(f"{len(clip)} pictures in {groups} groups; 2 groups of 2 pictures are the least")
        parts = tuple(np.array_split(np.arange(len(clip)), groups))
        return cls(
            w=w,
            moments=tuple(Moments.of(torch.from_numpy(features[part])) for part in parts),
            clip=clip.astype(np.float64),
            right=right,
            groups=parts,
        )

    def mean_clip(self, kept: GroupIndices) -> float:
        """Mean cosine over the captions of the groups kept."""
        return float(np.concatenate([self.clip[self.groups[group]] for group in kept]).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One model at several guidance scales, in rising order.

    Attributes:
        points: all of the same captions in the same groups.
        reference: moments of real pictures' features.
    """

    points: tuple[CurvePoint, ...]
    reference: Moments
    _distances: dict[tuple[int, tuple[int, ...]], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if any(a.w >= b.w for a, b in pairwise(self.points)):
            raise ValueError(f"guidance must rise along a curve: {[point.w for point in self.points]}")

    @property
    def groups(self) -> range:
        """All groups of captions."""
        return range(len(self.points[0].groups))

    def index(self, w: float) -> int:
        """Where on the curve guidance `w` is.

        Raises:
            NoReading: if it is nowhere.
        """
        scales = [point.w for point in self.points]
        if w not in scales:
            raise IncomparableCurvesError(
                f"guidance {w:g} was not drawn; {', '.join(f'{scale:g}' for scale in scales)} were"
            )
        return scales.index(w)

    def fid(self, index: int, kept: GroupIndices) -> float:
        """Frechet distance to the reference, over the captions of the groups kept; computed once."""
        key = index, tuple(kept)
        if key not in self._distances:
            merged = reduce(Moments.merge, (self.points[index].moments[group] for group in kept))
            self._distances[key] = frechet_distance(merged, self.reference)
        return self._distances[key]


def metrics_at(curve: Curve, w: float) -> dict[str, Interval]:
    """FID, CLIP and, with an oracle, the share of attributes right (each counted, and all at once)."""
    index = curve.index(w)
    point = curve.points[index]
    told = {
        "fid": intervals.jackknife(curve.groups, lambda kept: curve.fid(index, kept)),
        "clip": intervals.mean(point.clip),
    }
    if point.right is not None:
        told["attributes"] = intervals.mean(point.right.mean(axis=1))
        told["all_attributes"] = intervals.share(int(point.right.all(axis=1).sum()), n=len(point.right))
    return told


def paired_differences(curve: Curve, baseline: Curve, *, w: float) -> dict[str, Interval]:
    """What `curve` has more than `baseline` at the same guidance, of each of `metrics_at`, paired by caption."""
    a, b = curve.index(w), baseline.index(w)
    ours, theirs = curve.points[a], baseline.points[b]
    told = {
        "fid": intervals.jackknife(curve.groups, lambda kept: curve.fid(a, kept) - baseline.fid(b, kept)),
        "clip": intervals.mean(ours.clip - theirs.clip),
    }
    if ours.right is not None and theirs.right is not None:
        told["attributes"] = intervals.mean(ours.right.mean(axis=1) - theirs.right.mean(axis=1))
        both = ours.right.all(axis=1).astype(float) - theirs.right.all(axis=1)
        told["all_attributes"] = intervals.mean(both)
    return told


@dataclass(frozen=True, kw_only=True)
class EqualFidComparison:
    """How two curves differ in CLIP where their FIDs are equal.

    Attributes:
        clip: mean difference in CLIP, over evenly spaced FIDs.
        fid_low: the least FID that both curves reach.
        fid_high: the largest FID that both reach, on the side of high guidance.
    """

    clip: Interval
    fid_low: float
    fid_high: float


def clip_at_equal_fid(curve: Curve, baseline: Curve) -> EqualFidComparison:
    """The reading of SnapFusion Fig. 4: the mean of CLIP - CLIP_baseline at equal FID.

    Read on the side where FID rises with guidance, from each curve's least FID on, CLIP interpolated linearly
    over FID, at 50 evenly spaced FIDs between the ends of what both curves have.

    Raises:
        NoReading: if a curve does not rise, or the two have no FID in common.
    """
    branches = [_rising_branch(side, side.groups) for side in (curve, baseline)]
    low = max(float(fids[0]) for fids, _ in branches)
    high = min(float(fids[-1]) for fids, _ in branches)
    if any(len(fids) < 2 for fids, _ in branches):
        raise IncomparableCurvesError(
            "FID does not rise with guidance: the scales drawn end before its least value"
        )
    if low >= high:
        raise IncomparableCurvesError(
            f"no FID in common: one curve begins at {low:.4g}, the other ends at {high:.4g}"
        )
    levels = np.linspace(low, high, _NUM_LEVELS)

    def difference(kept: GroupIndices) -> float:
        ours, theirs = (np.interp(levels, *_rising_branch(side, kept)) for side in (curve, baseline))
        return float((ours - theirs).mean())

    return EqualFidComparison(clip=intervals.jackknife(curve.groups, difference), fid_low=low, fid_high=high)


def gap_closed(student: Curve, *, few: Curve, many: Curve, w: float) -> Interval:
    """(FID_few - FID_student) / (FID_few - FID_many) at guidance `w`: 0 is like few steps, 1 like many.

    Raises:
        NoReading: if many steps are no better than few, so that there is no gap.
    """
    places = {side: side.index(w) for side in (student, few, many)}

    def fid(side: Curve, kept: GroupIndices) -> float:
        return side.fid(places[side], kept)

    if fid(few, few.groups) <= fid(many, many.groups):
        raise IncomparableCurvesError(
            f"at guidance {w:g} many steps have no lower FID than few: there is no gap to close"
        )

    def closed(kept: GroupIndices) -> float:
        return (fid(few, kept) - fid(student, kept)) / (fid(few, kept) - fid(many, kept))

    return intervals.jackknife(student.groups, closed)


def _rising_branch(curve: Curve, kept: GroupIndices) -> tuple[np.ndarray, np.ndarray]:
    """FID and CLIP of the points from the least FID on; a point below its predecessor's FID is left out."""
    fids = np.array([curve.fid(index, kept) for index in range(len(curve.points))])
    clips = np.array([point.mean_clip(kept) for point in curve.points])
    start = int(fids.argmin())
    fids, clips = fids[start:], clips[start:]
    highest = np.maximum.accumulate(fids)
    rises = np.concatenate([[True], fids[1:] > highest[:-1]])
    return fids[rises], clips[rises]
