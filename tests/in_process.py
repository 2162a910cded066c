"""Stages run one after the other in this process: what Ray does, without Ray."""

from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.ray_data.execution import PipelineStage


def in_process(items: Iterable[Any], stages: list[PipelineStage]) -> Iterator[Any]:
    """A `pipelines.ray_data.execution.Runner`."""
    works = [stage.build(**stage.arguments) for stage in stages]
    yield from _through(items, works)


def _through(items: Iterable[Any], works: list[Any]) -> Iterator[Any]:
    if not works:
        yield from items
        return
    for item in items:
        result = works[0](item)
        yield from _through(result if isinstance(result, Iterator) else [result], works[1:])
