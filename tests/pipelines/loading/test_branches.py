"""Two cursors: the branch of a step is a function of the step, and so is the row each cursor stands at."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.loading.branches import BranchLoader, branch_and_draw, count_branch_rows, unit_name
from pipelines.loading.loader import LoaderError, is_held_out
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.schemas import targets_schema

SCHEMA = targets_schema(latent_shape=(4, 2, 2), num_tokens=3, x_dtype="float16")
PARENTS = [(f"web-{n:05d}-000000-{size:06d}", size) for n, size in enumerate((7, 5, 9, 4))]


def row(parent: str, number: int, *, draw: int, guided: bool) -> dict:
    return {
        "id": f"{parent}/{number}#{draw}",
        "source_id": "http://origin",
        "draw": draw,
        "token_ids": np.full(3, number, "<i4").tobytes(),
        "latent": np.full((4, 2, 2), number / 8, "<f2").tobytes(),
        "noise_key": number,
        "interval": 1,
        "t": 749,
        "t2": 499,
        "k": 2,
        "w": 2.5 if guided else None,
        "x_target": np.full((4, 2, 2), -number / 8, "<f2").tobytes(),
    }


class Units:
    """A table in memory: each parent with two vanilla draws and one guided."""

    def __init__(self, draws=((0, False), (1, True), (2, False))):
        self.rows = {
            unit_name(parent, draw=draw, guided=guided): pa.Table.from_pylist(
                [row(parent, number, draw=draw, guided=guided) for number in range(size)], schema=SCHEMA
            )
            for parent, size in PARENTS
            for draw, guided in draws
        }
        self.units = [
            SimpleNamespace(unit=name, path=f"{name}.parquet", rows=rows.num_rows)
            for name, rows in sorted(self.rows.items())
        ]

    def read_unit(self, unit, columns=None):
        return self.rows[unit.unit].select(columns)


def third(step: int) -> bool:
    """Every third step is guided, with a hitch."""
    return step % 3 == 1 or step == 9


def loader(table=None, *, guided=third, seed=0, **settings):
    return BranchLoader(
        table or Units(),
        guided=guided,
        global_batch=6,
        seed=seed,
        settings=LoaderSettings(**{"window_units": 2, **settings}),
    )


def take(made, *, start=0, count=20, rank=0, world=1):
    batches = made.batches(start, rank=rank, world=world)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def ids(batches):
    return [batch.ids for batch in batches]


def test_a_batch_is_of_the_branch_that_its_step_takes():
    for step, batch in enumerate(take(loader())):
        assert ("w" in batch.columns) == third(step)
        assert {int(row_id.rpartition("#")[2]) for row_id in batch.ids} <= ({1} if third(step) else {0, 2})


@pytest.mark.parametrize("world", [2, 4])
def test_the_sequence_does_not_depend_on_the_number_of_workers(world):
    shares = [ids(take(loader(), rank=rank, world=world)) for rank in range(world)]
    joined = [Counter(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert joined == [Counter(batch) for batch in ids(take(loader()))]


@pytest.mark.parametrize("start", [1, 2, 9, 10, 14])
def test_the_sequence_does_not_depend_on_a_restart(start):
    assert ids(take(loader(), start=start, count=5)) == ids(take(loader()))[start : start + 5]


def test_each_cursor_sees_each_of_its_rows_once_an_epoch():
    made = take(loader(), count=120)
    for branch, rows in ((True, 25), (False, 50)):
        mine = [batch for step, batch in enumerate(made) if third(step) == branch]
        seen = list(itertools.chain(*ids(mine)))
        epochs = [seen[start : start + rows] for start in range(0, 3 * rows, rows)]
        assert all(len(set(epoch)) == rows for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_the_cursor_of_a_branch_does_not_depend_on_when_its_turn_comes():
    def vanilla_of(guided):
        return [
            batch.ids for step, batch in enumerate(take(loader(guided=guided), count=18)) if not guided(step)
        ][:6]

    assert vanilla_of(third) == vanilla_of(lambda step: step % 2 == 0) == vanilla_of(lambda _: False)


def test_columns_come_as_tensors_and_w_in_guided_batches_alone():
    vanilla, guided = take(loader(), count=2)
    assert "w" not in vanilla.columns
    assert (guided["w"].dtype, guided["w"].tolist()) == (torch.float32, [2.5] * 6)
    for batch in (vanilla, guided):
        number = int(batch.ids[0].rpartition("/")[2].partition("#")[0])
        assert batch["x_target"].dtype == batch["latent"].dtype == torch.float32
        assert batch["x_target"][0, 0, 0, 0] == -number / 8 == -batch["latent"][0, 0, 0, 0]
        assert batch["noise_key"].dtype == torch.int64
        assert (batch["t"].tolist(), batch["k"].tolist()) == ([749] * 6, [2] * 6)


def test_a_step_of_a_branch_without_rows_is_told():
    vanilla = Units(draws=((0, False),))
    assert (count_branch_rows(vanilla, guided=True), count_branch_rows(vanilla, guided=False)) == (0, 25)
    assert len(take(loader(vanilla, guided=lambda _: False))) == 20
    with pytest.raises(LoaderError, match="step 1 needs guided rows, and the table has none"):
        take(loader(vanilla))


def test_a_null_in_a_guided_unit_is_told():
    table = Units()
    name = next(name for name in table.rows if name.startswith("guided"))
    rows = table.rows[name].to_pylist()
    rows[2]["w"] = None
    table.rows[name] = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pytest.raises(LoaderError, match=f"row {rows[2]['id']} has no w"):
        take(loader(table), count=40)


def test_held_out_draws_are_never_trained_on_and_all_evaluated():
    made = loader(held_out=0.2)
    trained = set(itertools.chain(*ids(take(made, count=90))))
    for guided in (True, False):
        kept = [row_id for batch in made.held_out(guided=guided, rows=4) for row_id in batch.ids]
        assert kept
        assert all(is_held_out(row_id, fraction=0.2) for row_id in kept)
        assert not trained & set(kept)
        assert all(("w" in batch.columns) == guided for batch in made.held_out(guided=guided, rows=4))


def test_a_table_with_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="no rows to train on"):
        loader(Units(draws=()))


def test_a_units_name_says_branch_and_draw():
    for guided in (True, False):
        assert branch_and_draw(unit_name("web-00000-0-4", draw=12, guided=guided)) == (guided, 12)
    with pytest.raises(LoaderError, match="not named as in TARGETS"):
        branch_and_draw("web-00000-0-4")
