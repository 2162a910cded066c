"""Keeps the distances of images to real ones in files, one for each contender and guidance.

At full size they take half a minute of a core each; an evaluation that is killed among them continues with
the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from jobs.runtime.logs import logger
from pipelines.storage.objects import exists, read_bytes, replace_object
from snapfusion.metrics.curve_point import ImageDistances
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.intervals import Interval
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NeighborReference
from snapfusion.metrics.parallel import Map
from snapfusion.settings import digest

_VERSION = 1
"""Raised when the same features would have other distances."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RealImages:
    """Features of real images, as distances need them.

    Attributes:
        moments: of all.
        kernel: of those for KID; None for none.
        neighbors: of those for precision and recall; None for none.
    """

    moments: Moments
    kernel: KernelReference | None
    neighbors: NeighborReference | None = None

    @cached_property
    def sha256(self) -> str:
        """The hash of all that distances depend on."""
        parts = [self.moments.mean, self.moments.scatter, torch.tensor([float(self.moments.count)])]
        if self.kernel is not None:
            parts.append(self.kernel.features)
        if self.neighbors is not None:
            parts.append(self.neighbors.features[:, None])  # another shape than the kernel's
        return _sha256(*(part.double().numpy() for part in parts))


@dataclass(frozen=True, kw_only=True)
class FurtherMetric:
    """A metric of images that needs more than their features.

    Attributes:
        name: of the metric.
        identity: what it depends on beside the images, as JSON values.
        measure: computes it.
    """

    name: str
    identity: Mapping[str, Any]
    measure: Callable[[], Interval]


@dataclass(frozen=True, kw_only=True)
class DistanceFiles:
    """A folder of files, each named by the hash of the features and of the real images.

    Attributes:
        url: of the folder.
        real: images that others are compared with.
        parallel: computes what is missing.
    """

    url: str
    real: RealImages
    parallel: Map

    def distances(
        self,
        features: np.ndarray,
        *,
        grouping: ImageGroups,
        further: Sequence[FurtherMetric] = (),
    ) -> ImageDistances:
        """The distances of features float32 [N,D], read if they have been computed before.

        Args:
            features: of the images.
            grouping: of the images.
            further: metrics of the images' diversity.
        """
        identity = {
            "version": _VERSION,
            "features": _sha256(features),
            "real": self.real.sha256,
            "groups": [grouping.size, grouping.draws],
            **{metric.name: metric.identity for metric in further},
        }
        url = f"{self.url}/{digest(identity)}.json"
        if exists(url):
            try:
                return self._parse(json.loads(read_bytes(url)), grouping)
            except (ValueError, KeyError, TypeError) as error:
                logger.warning(f"{url} is damaged ({error!r}) and computed again")
        found = ImageDistances.of(
            features,
            grouping=grouping,
            reference=self.real.moments,
            kernel=self.real.kernel,
            neighbors=self.real.neighbors,
            parallel=self.parallel,
        )
        measured = {metric.name: metric.measure() for metric in further}
        found = replace(found, diversity={**found.diversity, **measured})
        replace_object(url, json.dumps(_record(found, grouping)).encode())
        return found

    def _parse(self, record: dict[str, Any], grouping: ImageGroups) -> ImageDistances:
        frechet = dict(zip(grouping.subsets, record["frechet"], strict=True))
        kernel = None
        if self.real.kernel is not None:
            kernel = KernelSums(
                counts=tuple(map(int, record["counts"])),
                within=torch.tensor(record["within"], dtype=torch.float64),
                across=torch.tensor(record["across"], dtype=torch.float64),
                reference=self.real.kernel,
            )
        diversity = {name: Interval(*ends) for name, ends in record["diversity"].items()}
        return ImageDistances(frechet=frechet, kernel=kernel, diversity=diversity)


def _record(distances: ImageDistances, grouping: ImageGroups) -> dict[str, Any]:
    record: dict[str, Any] = {
        "frechet": [distances.frechet[subset] for subset in grouping.subsets],
        "diversity": distances.diversity,
    }
    if (kernel := distances.kernel) is not None:
        sums = {"within": kernel.within.tolist(), "across": kernel.across.tolist()}
        record |= {"counts": [*kernel.counts], **sums}
    return record


def _sha256(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype} {array.shape} ".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
