"""A driver that generates PAIRS on a Ray cluster of its own, to be killed by test_execution."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pair_inputs import CAPTIONS, SETTINGS

from jobs.runtime.cluster import connect
from jobs.runtime.settings import ClusterSettings
from pipelines.datasets.pairs import generate_pairs
from pipelines.ray_data.execution import PipelineStage, run_on_ray


def slowly(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """Pass results on with a pause, so that there is a time between a file and its commit."""
    for result in run_on_ray(items, stages):
        time.sleep(2)
        yield result


if __name__ == "__main__":
    connect(ClusterSettings())
    generate_pairs(
        SETTINGS, teacher=sys.argv[1], captions=CAPTIONS, source="list", url=sys.argv[2], run=slowly
    )
