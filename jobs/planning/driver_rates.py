"""Measures what a driver does after the last row, as rates of one thread.

python -m jobs.planning.driver_rates --features 2048

prints them as JSON; `snapfusion plan` measures them with the features of the recipe's evaluation.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from jobs.evaluation.memory import ResidentMemory
from jobs.planning import timings
from jobs.planning.rates_and_prices import Rate
from pipelines.costs.stage import WorkKind
from pipelines.datasets.references import features_of
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import commit_units
from pipelines.tables.schemas import references_schema
from pipelines.tables.table import create_table, open_table
from pipelines.tables.units import FinishedRows, Unit
from snapfusion.metrics.kernel import KernelReference, KernelSums
from snapfusion.metrics.lpips import Lpips, lpips_gmacs
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NeighborReference
from snapfusion.metrics.subset_distances import ReferenceSpace, packed_size
from snapfusion.training.checkpoint import CheckpointStore

_FEW_UNITS, _MORE_UNITS = 8, 72
"""Units of a table; the difference of both times is that of the units alone."""
_ROWS = 128
"""Of a unit."""
_IMAGES = 1_000
"""Compared with each other, and summed."""
_NUMBERS = 4_000_000
"""Of a checkpoint's weights."""
_LPIPS_IMAGES, _LPIPS_SIDE = 5, 128
"""Of one caption, and their pixels a side."""


def driver_mib() -> float:
    """Present memory of this process, which has driven a data job and a training of the miniature."""
    return ResidentMemory().now_mb() * 1e6 / 2**20


def measure_driver(*, url: str, features: int) -> Iterator[tuple[WorkKind, Rate]]:
    """Rates of a driver's kinds of work, in an empty folder, with feature vectors of so many numbers."""
    yield from _table_rates(f"{url}/table", features=features)
    yield "save_weights", Rate(seconds=_seconds_to_save(f"{url}/weights"))
    yield from _distance_rates(features)
    yield "lpips_image", _lpips_rate()


def _table_rates(url: str, *, features: int) -> Iterator[tuple[WorkKind, Rate]]:
    schema = references_schema(features=features)
    table = create_table(url, schema=schema, identity={"kind": "references"})
    write = WriteUnit(url=table.url, schema=schema, settings="probe")
    vectors = np.random.default_rng(0).standard_normal((_ROWS, features), dtype=np.float32)

    def commit(numbers: range) -> None:
        commit_units(table.url, [write(_unit(number, vectors)) for number in numbers])

    def seconds() -> float:
        return timings.median_seconds(lambda: open_table(url).manifests(), least=timings.SECONDS / 4)

    commit(range(_FEW_UNITS))
    few = seconds()
    for start in range(_FEW_UNITS, _MORE_UNITS, _FEW_UNITS):
        commit(range(start, start + _FEW_UNITS))
    yield "commit", _rate((seconds() - few) / (_MORE_UNITS - _FEW_UNITS))
    rows = _MORE_UNITS * _ROWS
    snapshot = open_table(url)

    def read() -> None:
        hashlib.sha256(features_of(snapshot, limit=rows).data)

    yield "read_features", _rate(timings.median_seconds(read) / (rows * features / 1e6))


def _unit(number: int, vectors: np.ndarray) -> FinishedRows:
    start, rows = number * len(vectors), len(vectors)
    unit = Unit(
        name=f"probe-{number:06d}",
        source="probe",
        start=start,
        stop=start + rows,
        final=False,
        source_digest="",
    )
    ids = [f"probe/{row}" for row in range(start, start + rows)]
    return FinishedRows(unit=unit, columns={"id": ids, "features": vectors}, rejections=[])


def _seconds_to_save(url: str) -> float:
    """Seconds for 10^6 numbers of a checkpoint."""
    store, weights = CheckpointStore(url, keep=1), {"weights": torch.randn(_NUMBERS)}
    seconds = timings.median_seconds(lambda: store.save(1, tensors={"model": weights}, values={}))
    return seconds / (_NUMBERS / 1e6)


def _distance_rates(width: int) -> Iterator[tuple[WorkKind, Rate]]:
    vectors = torch.randn(_IMAGES, width)
    few = Moments.of(vectors)
    # As many images as an evaluation has span all features.
    scatter = few.scatter + torch.eye(width, dtype=torch.float64)
    real = Moments(count=few.count, mean=few.mean, scatter=scatter)
    variance = float(real.covariance().trace())
    space = ReferenceSpace(origin=few.mean, reference=real, variance=variance)
    rows, triangle = torch.arange(_IMAGES), partial(torch.zeros, packed_size(width), dtype=torch.float64)
    # CPU time, as the export's: one thread computes, and nothing waits.
    seconds = _cpu_seconds(lambda: space.sums(vectors, (rows, triangle())))
    yield "sum_features", _rate(seconds / _IMAGES, macs=width**2)
    whole = space.sums(vectors, (rows, triangle()))
    seconds = _cpu_seconds(lambda: space.distance(whole, ()))
    yield "subset_distance", _rate(seconds, macs=width**3)
    kernel = KernelReference(features=vectors.double(), within=0.0)
    neighbors = NeighborReference.of(kernel.features)

    def compare() -> None:
        # Each compares the images with each other, and with the real ones.
        KernelSums.of(vectors, groups=[rows.numpy()], reference=kernel)
        neighbors.compare(vectors)

    yield "image_pair", _rate(_cpu_seconds(compare) / (4 * _IMAGES**2), macs=width)


def _lpips_rate() -> Rate:
    network = Lpips("alex")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    shape = (_LPIPS_IMAGES, 3, _LPIPS_SIDE, _LPIPS_SIDE)
    images = torch.randint(256, shape, dtype=torch.uint8)
    seconds = _cpu_seconds(lambda: network.pairwise(images)) / _LPIPS_IMAGES
    return _rate(seconds, macs=1e9 * lpips_gmacs("alex", side=_LPIPS_SIDE))


_cpu_seconds = partial(timings.median_seconds, clock=time.process_time)


def _rate(seconds: float, *, macs: float | None = None) -> Rate:
    # A difference of two times can be zero or less on a busy machine.
    return Rate(seconds=max(seconds, 1e-9), gmacs=None if macs is None else macs / 1e9)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--features", type=int, default=2_048, help="numbers of a feature vector")
    width = parser.parse_args().features
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rates = {kind: [rate.to_values()] for kind, rate in measure_driver(url=scratch, features=width)}
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
