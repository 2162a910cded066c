"""FID-CLIP curves over guidance scales, and paired comparisons of models. SnapFusion Sec. 5, Fig. 4 and 6.

All models generate the same captions from the same noise, so differences are paired: their intervals come
from what the two models differ in, not from how captions differ. With several draws for each caption
intervals are over draws, and the captions stay as they are; with one they are over captions. Statistics that
are no mean have jackknife intervals that leave out one draw of every caption, or one group of captions, at a
time, from both models at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from snapfusion.metrics import intervals
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments

_NUM_LEVELS = 50
"""Number of FIDs at which two curves are compared."""

_PARTITIONS = 6
"""Ways to put the draws into groups, over which an interval's variance is averaged."""

GroupIndices = Sequence[int]
"""Groups of images that a statistic is computed over."""


class CurveError(ValueError):
    """A comparison that the curves do not allow; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """One model's images at one guidance scale.

    Attributes:
        w: guidance scale of SnapFusion Eq. 3.
        moments: of the features, one for each group.
        kernel: sums of the kernel by group; None without a kernel distance.
        clip: cosine of each image with its caption, float64 [n]: draw by draw in order of the captions.
        right: attributes that match the caption, 0 or 1 [n,A]; None without an oracle.
        groups: for each group the indices of its images. Several partitions of all images stand one after the
            other, each of as many groups.
        partitions: their number.
        draws: images of each caption; with more than one, a group has one of each.
    """

    w: float
    moments: tuple[Moments, ...]
    kernel: KernelSums | None
    clip: np.ndarray
    right: np.ndarray | None
    groups: tuple[np.ndarray, ...]
    partitions: int = 1
    draws: int = 1

    @classmethod
    def of(
        cls,
        *,
        w: float,
        features: np.ndarray,
        clip: np.ndarray,
        right: np.ndarray | None,
        groups: int,
        draws: int = 1,
        reference: KernelReference | None = None,
    ) -> CurvePoint:
        """A point of features float32 [n,D] and scores of n images.

        Args:
            w: guidance scale.
            features: of the images, draw by draw.
            clip: cosine of each, float [n].
            right: matching attributes, or None.
            groups: number of contiguous groups of captions; not used with several draws.
            draws: images of each caption.
            reference: of the kernel distance; None for none.

        Raises:
            ValueError: unless there are two groups or more, and two images or more for each.
        """
        groups = groups if draws == 1 else draws
        if groups < 2 or len(clip) < 2 * groups:
            raise ValueError(f"{len(clip)} images in {groups} groups; at least 2 groups of 2 are needed")
        if draws == 1:
            parts = tuple(np.array_split(np.arange(len(clip)), groups))
        else:
            parts = _draw_groups(draws, captions=len(clip) // draws)
        vectors = torch.from_numpy(features)
        return cls(
            w=w,
            moments=tuple(Moments.of(vectors[part]) for part in parts),
            kernel=None if reference is None else _kernel_sums(vectors, parts, groups, reference=reference),
            clip=clip.astype(np.float64),
            right=right,
            groups=parts,
            partitions=len(parts) // groups,
            draws=draws,
        )

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Of each image, float64 [n]: CLIP, and with an oracle the matching attributes (mean, and all)."""
        if self.right is None:
            return {"clip": self.clip}
        all_right = self.right.all(axis=1).astype(float)
        return {"clip": self.clip, "attributes": self.right.mean(axis=1), "all_attributes": all_right}

    def mean(self, values: np.ndarray) -> Interval:
        """The mean of a value of each image, float64 [n], with an interval over draws, or over captions."""
        return (
            intervals.mean(values)
            if self.draws == 1
            else intervals.mean_within(values.reshape(self.draws, -1))
        )

    def mean_clip(self, groups: GroupIndices) -> float:
        """Mean cosine over the images of these groups."""
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
        """Groups of all images, each in one."""
        return self.partitions[0]

    @property
    def partitions(self) -> Sequence[range]:
        """The groups of each partition of all images."""
        point = self.points[0]
        size = len(point.groups) // point.partitions
        return [range(start, start + size) for start in range(0, len(point.groups), size)]

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
        scales = [point.w for point in self.points]
        if w not in scales:
            available = ", ".join(f"{scale:g}" for scale in scales)
            raise CurveError(f"there are no images at guidance {w:g}; {available} are available")
        return scales.index(w)

    def fid(self, index: int, groups: GroupIndices) -> float:
        """Frechet distance to the reference, over the images of these groups."""
        key = index, tuple(groups)
        # Cached: comparisons ask for the same distances, which take most of their time.
        if key not in self._distances:
            merged = reduce(Moments.merge, (self.points[index].moments[group] for group in groups))
            self._distances[key] = frechet_distance(merged, self.reference)
        return self._distances[key]

    def kid(self, index: int, groups: GroupIndices) -> float:
        """Kernel distance to the reference, over the images of these groups.

        Raises:
            CurveError: if the point has no sums of the kernel.
        """
        kernel = self.points[index].kernel
        if kernel is None:
            raise CurveError("the curve has no kernel distance")
        return kernel.distance(groups)


def metrics_at(curve: Curve, w: float) -> dict[str, Interval]:
    """FID, KID, CLIP and, with an oracle, the proportion of matching attributes (single, and all five)."""
    index = curve.index(w)
    point = curve.points[index]
    scores = point.scores
    metrics = {"fid": curve.interval(lambda groups: curve.fid(index, groups))}
    if point.kernel is not None:
        metrics["kid"] = curve.interval(lambda groups: curve.kid(index, groups))
    metrics |= {name: point.mean(values) for name, values in scores.items()}
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
    if point.kernel is not None and other.kernel is not None:
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


def _kernel_sums(
    features: Tensor, parts: Sequence[np.ndarray], groups: int, *, reference: KernelReference
) -> KernelSums:
    """Sums over the first images of each group, in all as many as there are real ones at most."""
    most = max(2, len(reference.features) // groups)
    return KernelSums.of(features, groups=[part[:most] for part in parts], reference=reference)


@functools.cache
def _draw_groups(draws: int, *, captions: int) -> tuple[np.ndarray, ...]:
    """Partitions of `draws` x `captions` images into groups with one image of each caption.

    The first is draw by draw, in the others each caption's draws are permuted; the same for all models.
    """
    images = np.arange(draws * captions).reshape(draws, captions)
    random = np.random.default_rng(0)
    others = (random.permuted(images, axis=0) for _ in range(_PARTITIONS - 1))
    return tuple(group for partition in (images, *others) for group in partition)


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
