"""FID-CLIP curves over guidance scales, and paired comparisons of models. SnapFusion Sec. 5, Fig. 4 and 6.

All models generate the same captions from the same noise, so differences are paired: their intervals come
from what the two models differ in, not from how captions differ. Statistics that are no mean over captions
have jackknife intervals that leave out one group of captions at a time, from both models at once.
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
"""Number of FIDs at which two curves are compared."""

GroupIndices = Sequence[int]
"""Groups of captions that a statistic is computed over."""


class CurveError(ValueError):
    """A comparison that the curves do not allow; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """One model's images at one guidance scale.

    Attributes:
        w: guidance scale of SnapFusion Eq. 3.
        moments: of the features, one for each group of captions.
        clip: cosine of each image with its caption, float64 [n], in order of the captions.
        right: attributes that match the caption, 0 or 1 [n,A]; None without an oracle.
        groups: for each group the indices of its captions.
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
        """A point of features float32 [n,D] and scores of n images, split into contiguous groups.

        Raises:
            ValueError: unless there are two groups or more, and two images or more for each.
        """
        if groups < 2 or len(clip) < 2 * groups:
            raise ValueError(f"{len(clip)} images in {groups} groups; at least 2 groups of 2 are needed")
        parts = tuple(np.array_split(np.arange(len(clip)), groups))
        moments = tuple(Moments.of(torch.from_numpy(features[part])) for part in parts)
        return cls(w=w, moments=moments, clip=clip.astype(np.float64), right=right, groups=parts)

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Of each image, float64 [n]: CLIP, and with an oracle the matching attributes (mean, and all)."""
        if self.right is None:
            return {"clip": self.clip}
        all_right = self.right.all(axis=1).astype(float)
        return {"clip": self.clip, "attributes": self.right.mean(axis=1), "all_attributes": all_right}

    def mean_clip(self, groups: GroupIndices) -> float:
        """Mean cosine over the captions of these groups."""
        return float(np.concatenate([self.clip[self.groups[group]] for group in groups]).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One model at several guidance scales, in increasing order.

    Attributes:
        points: all of the same captions in the same groups.
        reference: moments of real images' features.
    """

    points: tuple[CurvePoint, ...]
    reference: Moments
    _distances: dict[tuple[int, tuple[int, ...]], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if any(a.w >= b.w for a, b in pairwise(self.points)):
            raise ValueError(f"guidance must increase along a curve: {[point.w for point in self.points]}")

    @property
    def groups(self) -> range:
        """All groups of captions."""
        return range(len(self.points[0].groups))

    def index(self, w: float) -> int:
        """Index of the point at guidance `w`.

        Raises:
            CurveError: if there is none.
        """
        scales = [point.w for point in self.points]
        if w not in scales:
            available = ", ".join(f"{scale:g}" for scale in scales)
            raise CurveError(f"there are no images at guidance {w:g}; {available} are available")
        return scales.index(w)

    def fid(self, index: int, groups: GroupIndices) -> float:
        """Frechet distance to the reference, over the captions of these groups."""
        key = index, tuple(groups)
        # Cached: comparisons ask for the same distances, which take most of their time.
        if key not in self._distances:
            merged = reduce(Moments.merge, (self.points[index].moments[group] for group in groups))
            self._distances[key] = frechet_distance(merged, self.reference)
        return self._distances[key]


def metrics_at(curve: Curve, w: float) -> dict[str, Interval]:
    """FID, CLIP and, with an oracle, the proportion of matching attributes (single, and all of an image)."""
    index = curve.index(w)
    scores = curve.points[index].scores
    metrics = {"fid": intervals.jackknife(curve.groups, lambda groups: curve.fid(index, groups))}
    metrics |= {name: intervals.mean(values) for name, values in scores.items()}
    if "all_attributes" in scores:
        successes = scores["all_attributes"]
        metrics["all_attributes"] = intervals.proportion(int(successes.sum()), n=len(successes))
    return metrics


def paired_differences(curve: Curve, baseline: Curve, *, w: float) -> dict[str, Interval]:
    """Each metric of `metrics_at` at the same guidance, `curve` minus `baseline`, paired by caption."""
    a, b = curve.index(w), baseline.index(w)
    ours, theirs = curve.points[a].scores, baseline.points[b].scores

    def difference(groups: GroupIndices) -> float:
        return curve.fid(a, groups) - baseline.fid(b, groups)

    metrics = {"fid": intervals.jackknife(curve.groups, difference)}
    return metrics | {name: intervals.mean(ours[name] - theirs[name]) for name in ours if name in theirs}


@dataclass(frozen=True, kw_only=True)
class EqualFidComparison:
    """The difference of two curves in CLIP at equal FID.

    Attributes:
        clip: mean difference in CLIP, over evenly spaced FIDs.
        fid_low: the lowest FID that both curves reach.
        fid_high: the highest FID that both reach, on the side of high guidance.
    """

    clip: Interval
    fid_low: float
    fid_high: float


def clip_at_equal_fid(curve: Curve, baseline: Curve) -> EqualFidComparison:
    """The comparison of SnapFusion Fig. 4: the mean of CLIP - CLIP_baseline at equal FID.

    Uses the branch where FID rises with guidance, from each curve's lowest FID on. CLIP is interpolated
    linearly over FID, at 50 evenly spaced FIDs within the range of both curves.

    Raises:
        CurveError: if a curve does not rise, or the two have no FID in common.
    """
    branches = [_rising_branch(side, side.groups) for side in (curve, baseline)]
    low = max(float(fids[0]) for fids, _ in branches)
    high = min(float(fids[-1]) for fids, _ in branches)
    if any(len(fids) < 2 for fids, _ in branches):
        raise CurveError("FID does not rise with guidance: it is lowest at the highest; add higher scales")
    if low >= high:
        raise CurveError(f"no FID in common: one curve begins at {low:.4g}, the other ends at {high:.4g}")
    levels = np.linspace(low, high, _NUM_LEVELS)

    def difference(groups: GroupIndices) -> float:
        ours, theirs = (np.interp(levels, *_rising_branch(side, groups)) for side in (curve, baseline))
        return float((ours - theirs).mean())

    clip = intervals.jackknife(curve.groups, difference)
    return EqualFidComparison(clip=clip, fid_low=low, fid_high=high)


def gap_closed(student: Curve, *, few: Curve, many: Curve, w: float) -> Interval:
    """(FID_few - FID_student) / (FID_few - FID_many) at guidance `w`: 0 equals few steps, 1 many steps.

    Raises:
        CurveError: if many steps are no better than few, so that there is no gap.
    """

    def fids(groups: GroupIndices) -> list[float]:
        return [side.fid(side.index(w), groups) for side in (few, student, many)]

    def closed(groups: GroupIndices) -> float:
        fid_few, fid_student, fid_many = fids(groups)
        return (fid_few - fid_student) / (fid_few - fid_many)

    fid_few, _, fid_many = fids(few.groups)
    if fid_few <= fid_many:
        raise CurveError(f"no gap to close: at guidance {w:g} many steps have no lower FID than few")
    return intervals.jackknife(student.groups, closed)


def _rising_branch(curve: Curve, groups: GroupIndices) -> tuple[np.ndarray, np.ndarray]:
    """FID and CLIP of the points from the lowest FID on, without those below an earlier FID."""
    fids = np.array([curve.fid(index, groups) for index in range(len(curve.points))])
    clips = np.array([point.mean_clip(groups) for point in curve.points])
    start = int(fids.argmin())
    fids, clips = fids[start:], clips[start:]
    # `np.interp` needs increasing FIDs.
    highest = np.maximum.accumulate(fids)
    rises = np.concatenate([[True], fids[1:] > highest[:-1]])
    return fids[rises], clips[rises]
