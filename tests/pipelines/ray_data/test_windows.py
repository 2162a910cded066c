"""Ray is given a window of items, and the next one when that is done; and the sizes of each pool."""

from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.ray_data import execution
from pipelines.ray_data import settings as ray_data_settings
from pipelines.ray_data.execution import PipelineStage, actor_strategy, run_on_ray
from pipelines.ray_data.settings import Pool
from snapfusion.settings import SettingsError


def stage(**pool: int) -> PipelineStage:
    return PipelineStage(build=dict, arguments={}, pool=Pool(**pool))


@pytest.mark.parametrize(
    ("pool", "tasks", "sizes"),
    [
        (Pool(actors=3), None, (3, 3)),
        (Pool(actors=3), 2, (2, 2)),
        (Pool(actors=2, max_actors=5), None, (2, 5)),
        (Pool(actors=2, max_actors=5), 4, (2, 4)),
    ],
)
def test_ray_is_given_the_sizes_of_a_pool(pool, tasks, sizes):
    strategy = actor_strategy(pool, tasks=tasks)
    assert (strategy.min_size, strategy.max_size, strategy.initial_size) == (*sizes, sizes[0])


def test_fewer_at_most_than_at_least_are_refused():
    with pytest.raises(SettingsError, match=r"max_actors.*at least actors \(4\)"):
        Pool.parse({"actors": 4, "max_actors": 3})


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
    results = run_on_ray(items(), [stage(actors=1), stage(actors=1, max_actors=2)])
    assert next(results) == 0
    assert planned == [0, 1, 2, 3]
    assert list(results) == list(range(1, 10))
    assert windows == [4, 4, 2]
