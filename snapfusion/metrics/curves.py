"""FID-CLIP curves over guidance scales, and paired comparisons of models. SnapFusion Sec. 5, Fig. 4 and 6.

All models generate the same captions from the same noise, so differences are paired: their intervals come
from what the two models differ in, not from how captions differ. With several draws for each caption
intervals are over draws, and the captions stay as they are; with one they are over captions. Statistics that
are no mean have jackknife intervals that leave out one draw of every caption, or one group of captions, at a
time, from both models at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from snapfusion.metrics import intervals
from snapfusion.metrics.curve_point import CurvePoint
from snapfusion.metrics.image_groups import GroupIndices
from snapfusion.metrics.intervals import Interval

_NUM_LEVELS = 50
"""Number of FIDs at which two curves are compared."""


class CurveError(ValueError):
    """A comparison that the curves do not allow; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One model at several guidance scales, in increasing order.

    Attributes:
        points: all of the same captions in the same groups, and of distances to the same real images.
    """

    points: tuple[CurvePoint, ...]

    def __post_init__(self) -> None:
        if any(a.w >= b.w for a, b in pairwise(self.points)):
            raise ValueError(f"guidance must increase along a curve: {[point.w for point in self.points]}")

    @property
    def scales(self) -> list[float]:
        """The guidance of each point."""
        return [point.w for point in self.points]

    @property
    def groups(self) -> range:
        """Groups of all images, each in one."""
        return self.partitions[0]

    @property
    def partitions(self) -> Sequence[range]:
        """The groups of each partition of all images."""
        return self.points[0].grouping.partitions

    def interval(self, estimate: Callable[[GroupIndices], float]) -> Interval:
        """`estimate` of all images, with its interval over draws, or over captions."""
        if len(self.partitions) > 1:
            return intervals.jackknife_draws(self.partitions, estimate)
        return intervals.jackknife(self.groups, estimate)

    def index(self, w: float) -> int:
        """Index of the point at guidance `w`.

        Raises:
            CurveError: if there is none.
        """
        if w not in self.scales:
            available = ", ".join(f"{scale:g}" for scale in self.scales)
            raise CurveError(f"there are no images at guidance {w:g}; {available} are available")
        return self.scales.index(w)

    def fid(self, index: int, groups: GroupIndices) -> float:
        """Frechet distance to the reference, over the images of these groups: one of `grouping.subsets`."""
        return self.points[index].distances.frechet[tuple(groups)]

    def kid(self, index: int, groups: GroupIndices) -> float:
        """Kernel distance to the reference, over the images of these groups.

        Raises:
            CurveError: if the point has no sums of the kernel.
        """
        kernel = self.points[index].distances.kernel
        if kernel is None:
            raise CurveError("the curve has no kernel distance")
        return kernel.distance(groups)


def metrics_at(curve: Curve, w: float) -> dict[str, Interval]:
    """FID, KID, CLIP, diversity and, with an oracle, matching attributes (single, and all five)."""
    index = curve.index(w)
    point = curve.points[index]
    scores = point.scores
    metrics = {"fid": curve.interval(lambda groups: curve.fid(index, groups))}
    if point.distances.kernel is not None:
        metrics["kid"] = curve.interval(lambda groups: curve.kid(index, groups))
    metrics |= {name: point.mean(values) for name, values in scores.items()}
    metrics |= point.distances.diversity
    if "all_attributes" in scores:
        successes = scores["all_attributes"]
        metrics["all_attributes"] = intervals.proportion(int(successes.sum()), n=len(successes))
    return metrics


def paired_differences(curve: Curve, baseline: Curve, *, w: float) -> dict[str, Interval]:
    """Each metric of `metrics_at` at the same guidance, `curve` minus `baseline`, paired by caption."""
    return point_differences(curve, baseline, index=curve.index(w), baseline_index=baseline.index(w))


def point_differences(
    curve: Curve, baseline: Curve, *, index: int, baseline_index: int
) -> dict[str, Interval]:
    """Each metric of a point of `curve` minus that of a point of `baseline`, paired by caption and noise."""
    point, other = curve.points[index], baseline.points[baseline_index]
    ours, theirs = point.scores, other.scores

    def difference(distance: Callable[[Curve, int, GroupIndices], float]) -> Interval:
        return curve.interval(
            lambda groups: distance(curve, index, groups) - distance(baseline, baseline_index, groups)
        )

    metrics = {"fid": difference(Curve.fid)}
    if point.distances.kernel is not None and other.distances.kernel is not None:
        metrics["kid"] = difference(Curve.kid)
    return metrics | {name: point.mean(ours[name] - theirs[name]) for name in ours if name in theirs}


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
    if any(len(side.points) < 2 for side in (curve, baseline)):
        raise CurveError("images at one guidance alone are no curve; compare them by FID and CLIP")
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

    clip = curve.interval(difference)
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
    return student.interval(closed)


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
