"""Two cursors: a step's branch follows from the step, and each cursor's row from the position."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from memory_table import MemoryTable, ids, take

from pipelines.loading.branches import BranchLoader, branch_and_draw, count_branch_rows, unit_name
from pipelines.loading.loader import is_held_out
from pipelines.loading.rows import LoaderError
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


def table_of(draws=((0, False), (1, True), (2, False))):
    """Each parent with two vanilla draws and one guided."""
    return MemoryTable(
        {
            unit_name(parent, draw=draw, guided=guided): pa.Table.from_pylist(
                [row(parent, number, draw=draw, guided=guided) for number in range(size)], schema=SCHEMA
            )
            for parent, size in PARENTS
            for draw, guided in draws
        }
    )


def third(step: int) -> bool:
    """Every third step is guided, with one exception."""
    return step % 3 == 1 or step == 9


def loader(table=None, *, guided=third, seed=0, **settings):
    settings = LoaderSettings(**{"window_units": 2, **settings})
    return BranchLoader(table or table_of(), guided=guided, global_batch=6, seed=seed, settings=settings)


def draw_of(row_id: str) -> int:
    return int(row_id.rpartition("#")[2])


def test_batch_belongs_to_its_steps_branch():
    for step, batch in enumerate(take(loader())):
        assert ("w" in batch.columns) == third(step)
        assert {draw_of(row_id) for row_id in batch.ids} <= ({1} if third(step) else {0, 2})


def test_each_cursor_yields_rows_once_an_epoch():
    batches = ids(loader(), count=120)
    for branch, rows in ((True, 25), (False, 50)):
        seen = list(itertools.chain(*(batch for step, batch in enumerate(batches) if third(step) == branch)))
        epochs = [seen[start : start + rows] for start in range(0, 3 * rows, rows)]
        assert all(len(set(epoch)) == rows for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_cursor_is_independent_of_other_branchs_steps():
    def vanilla_of(guided):
        batches = ids(loader(guided=guided), count=18)
        return [batch for step, batch in enumerate(batches) if not guided(step)][:6]

    assert vanilla_of(third) == vanilla_of(lambda step: step % 2 == 0) == vanilla_of(lambda _: False)


def test_only_guided_batches_have_w():
    vanilla, guided = take(loader(), count=2)
    assert "w" not in vanilla.columns
    assert (guided["w"].dtype, guided["w"].tolist()) == (torch.float32, [2.5] * 6)
    for batch in (vanilla, guided):
        number = int(batch.ids[0].rpartition("/")[2].partition("#")[0])
        assert batch["x_target"].dtype == batch["latent"].dtype == torch.float32
        assert batch["x_target"][0, 0, 0, 0] == -number / 8 == -batch["latent"][0, 0, 0, 0]
        assert batch["noise_key"].dtype == torch.int64
        assert (batch["t"].tolist(), batch["k"].tolist()) == ([749] * 6, [2] * 6)


def test_step_of_a_branch_without_rows_is_refused():
    vanilla = table_of(draws=((0, False),))
    assert [count_branch_rows(vanilla, guided=guided) for guided in (True, False)] == [0, 25]
    assert len(take(loader(vanilla, guided=lambda _: False))) == 20
    with pytest.raises(LoaderError, match="step 1 needs guided rows"):
        take(loader(vanilla))


def test_null_in_a_guided_unit_is_named():
    table = table_of()
    name = next(name for name in table.tables if name.startswith("guided"))
    rows = table.tables[name].to_pylist()
    rows[2]["w"] = None
    table.tables[name] = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pytest.raises(LoaderError, match=f"row {rows[2]['id']} has no w"):
        take(loader(table), count=40)


def test_held_out_draws_are_not_trained_on():
    made = loader(held_out=0.2)
    trained = set(itertools.chain(*ids(made, count=90)))
    for guided in (True, False):
        held_out = list(made.held_out(guided=guided, rows=4))
        evaluated = {row_id for batch in held_out for row_id in batch.ids}
        assert evaluated
        assert all(is_held_out(row_id, fraction=0.2) for row_id in evaluated)
        assert not trained & evaluated
        assert all(("w" in batch.columns) == guided for batch in held_out)


def test_table_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows to train on"):
        loader(table_of(draws=()))


def test_table_with_another_unit_is_refused():
    with pytest.raises(LoaderError, match="web-00000-0-4 is not named as in TARGETS"):
        loader(MemoryTable(table_of().tables | {"web-00000-0-4": table_of().tables.popitem()[1]}))


def test_unit_name_has_branch_and_draw():
    for guided in (True, False):
        assert branch_and_draw(unit_name("web-00000-0-4", draw=12, guided=guided)) == (guided, 12)
    with pytest.raises(LoaderError, match="web-00000-0-4 is not named as in TARGETS"):
        branch_and_draw("web-00000-0-4")
