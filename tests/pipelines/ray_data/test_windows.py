"""Ray is given a window of items, and the next one when that is done."""

from collections.abc import Iterator
from typing import Any

from pipelines.ray_data import execution
from pipelines.ray_data import settings as ray_data_settings
from pipelines.ray_data.execution import PipelineStage, run_on_ray
from pipelines.ray_data.settings import Pool


def stage(actors: int) -> PipelineStage:
    return PipelineStage(build=dict, arguments={}, pool=Pool(actors=actors))


def test_items_are_planned_window_by_window(monkeypatch):
    planned, windows = [], []

    def items() -> Iterator[int]:
        for number in range(10):
            planned.append(number)
            yield number

    def run_window(window: list[int], _: Any) -> Iterator[int]:
        windows.append(len(window))
        yield from window

    monkeypatch.setattr(ray_data_settings, "_LEAST_WINDOW", 3)
    monkeypatch.setattr(ray_data_settings, "_ITEMS_PER_ACTOR", 2)
    monkeypatch.setattr(execution, "_run_window", run_window)
    results = run_on_ray(items(), [stage(1), stage(2)])
    assert next(results) == 0
    assert planned == [0, 1, 2, 3]
    assert list(results) == list(range(1, 10))
    assert windows == [4, 4, 2]
