"""Measures CPU time and memory of the metrics of a curve's points, whose features are given.

OMP_NUM_THREADS=1 python tests/snapfusion/metrics/curve_costs.py --points 4

prints JSON: CPU seconds without those of making the features, memory at the start and at its peak, and
the first point's FID.
With `--build FOLDER` it measures the repository there: the present one, or commit 66c16bd.
"""

import argparse
import importlib.util
import json
import resource
import sys
import time
from functools import reduce
from pathlib import Path

import numpy as np

DIMENSION = 2_048
GROUPS = 20


def features_of(point: int, *, rows: int) -> np.ndarray:
    """Features float32 [rows,2048] whose variances fall off from 10 to 1e-5, as Inception's do."""
    random = np.random.default_rng(point)
    features = random.standard_normal((rows, DIMENSION), dtype=np.float32)
    features *= np.geomspace(10.0, 1e-5, DIMENSION, dtype=np.float32) ** 0.5 * (1.0 + 0.02 * (point % 19))
    # A reflection, so that the covariance is not diagonal.
    axis = np.random.default_rng(0).standard_normal(DIMENSION).astype(np.float32)
    axis /= np.linalg.norm(axis)
    for part in np.array_split(features, 30):  # views
        np.subtract(part, np.outer(part @ axis, 2.0 * axis), out=part)
    features += 0.4
    return features


class Given:
    """Features and scores of points, and the CPU seconds that making them took."""

    def __init__(self, *, rows: int) -> None:
        self.rows = rows
        self.seconds = 0.0

    def point(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start = time.process_time()
        features = features_of(number, rows=self.rows)
        clip = np.random.default_rng(number).standard_normal(self.rows)
        self.seconds += time.process_time() - start
        return features, clip


def curve(given: Given, *, points: int, kid_images: int):
    """A curve of the present build, as `jobs.evaluation.curve_tables` makes it."""
    import torch

    from snapfusion.metrics.curve_point import CurvePoint, ImageDistances
    from snapfusion.metrics.curves import Curve
    from snapfusion.metrics.image_groups import ImageGroups
    from snapfusion.metrics.kernel import KernelReference
    from snapfusion.metrics.moments import Moments
    from snapfusion.metrics.neighbors import NeighborReference
    from snapfusion.metrics.parallel import over_cores

    grouping = ImageGroups.of(given.rows, groups=GROUPS, draws=1)
    with over_cores() as parallel:
        real = torch.from_numpy(given.point(1_000)[0])
        reference = reduce(Moments.merge, map(Moments.of, real.split(2_000)))
        kernel = KernelReference.of(real[:kid_images], parallel=parallel)
        neighbors = NeighborReference.of(kernel.features, parallel=parallel)
        del real

        def made(number: int) -> CurvePoint:
            features, clip = given.point(number)
            distances = ImageDistances.of(
                features,
                grouping=grouping,
                reference=reference,
                kernel=kernel,
                neighbors=neighbors,
                parallel=parallel,
            )
            w = 1.0 + 0.5 * number
            return CurvePoint(w=w, distances=distances, clip=clip, right=None, grouping=grouping)

        return Curve(points=tuple(map(made, range(points))))


def earlier_curve(given: Given, *, points: int, kid_images: int):
    """The same of commit 66c16bd, which kept the moments of every point."""
    import torch

    from snapfusion.metrics.curves import Curve, CurvePoint
    from snapfusion.metrics.kernel import KernelReference
    from snapfusion.metrics.moments import Moments

    real = torch.from_numpy(given.point(1_000)[0])
    reference, kernel = Moments.of(real), KernelReference.of(real[:kid_images])
    del real

    def made(number: int) -> CurvePoint:
        features, clip = given.point(number)
        w = 1.0 + 0.5 * number
        return CurvePoint.of(w=w, features=features, clip=clip, right=None, groups=GROUPS, reference=kernel)

    return Curve(points=tuple(map(made, range(points))), reference=reference)


def resident_mib() -> int:
    """Present memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))


def measure(*, points: int, rows: int, kid_images: int) -> dict[str, object]:
    """The figures of so many points, each with its metrics and its differences to the first one."""
    import torch

    from snapfusion.metrics.curves import metrics_at, point_differences

    started = resident_mib()
    is_present = importlib.util.find_spec("snapfusion.metrics.curve_point") is not None
    given = Given(rows=rows)
    start, began = time.process_time(), time.perf_counter()
    made = (curve if is_present else earlier_curve)(given, points=points, kid_images=kid_images)
    metrics = [metrics_at(made, point.w) for point in made.points]
    differences = [point_differences(made, made, index=n, baseline_index=0) for n in range(points)]
    return {
        "points": points,
        "rows": rows,
        "kid_images": kid_images,
        "cpu_s": round(time.process_time() - start - given.seconds, 1),
        "wall_s": round(time.perf_counter() - began, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "start_mib": started,
        "threads": torch.get_num_threads(),
        "fid": list(metrics[0]["fid"]),
        "kid": list(metrics[0]["kid"]),
        "last_difference": list(differences[-1]["fid"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[3], help="repository to measure")
    parser.add_argument("--points", type=int, default=1)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--kid-images", type=int, default=5_000)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.build))
    print(json.dumps(measure(points=arguments.points, rows=arguments.rows, kid_images=arguments.kid_images)))


if __name__ == "__main__":
    main()
