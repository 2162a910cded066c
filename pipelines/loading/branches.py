"""TARGETS as the batches of Eq. 11: two cursors, over vanilla and over guided rows.

A step is guided or not for all ranks and all rows at once, so each branch has units of its own, read by a
cursor of its own. Which branch a step takes is a function of the step; how far each cursor has come then
follows from the position, and a restart needs to know nothing else. Knows no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import pyarrow as pa

from pipelines.loading.buckets import BucketLoader, RowCount, make_loader, total_rows
from pipelines.loading.loader import BatchLoader, LoaderError, UnitReader, count_trainable
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.table import UnitFile
from snapfusion.noise import noise_key
from snapfusion.training.batch import Batch
from snapfusion.training.step_distillation import BRANCHES

COLUMNS: Final = ("latent", "token_ids", "noise_key", "interval", "t", "t2", "k", "x_target")
"""What a batch has of each row; a guided batch has `w` besides."""

_NAME = re.compile(r"(?P<branch>vanilla|guided)-d(?P<draw>\d{4,})-.")


def unit_name(parent: str, *, draw: int, guided: bool) -> str:
    """The name of the unit that is made of the LATENTS unit `parent`; its branch stands first."""
    return f"{BRANCHES[guided]}-d{draw:04d}-{parent}"


def branch_and_draw(name: str) -> tuple[bool, int]:
    """Whether the rows of a unit are guided, and their draw: what its name says.

    Raises:
        LoaderError: if it is no unit of TARGETS.
    """
    found = _NAME.match(name)
    if found is None:
        raise LoaderError(f"unit {name} has no name of TARGETS, such as 'guided-d0003-' and the LATENTS unit")
    return found["branch"] == BRANCHES[True], int(found["draw"])


def is_guided_unit(name: str) -> bool:
    """Which branch the rows of a unit belong to, by its name."""
    return branch_and_draw(name)[0]


def count_branch_rows(table: UnitReader, *, guided: bool) -> int:
    """Committed rows of one branch."""
    return sum(file.rows for file in table.units if is_guided_unit(file.unit) == guided)


@dataclass(frozen=True, kw_only=True)
class _BranchUnits:
    """The units of one branch, as a table."""

    table: UnitReader
    units: list[UnitFile]

    def read_unit(self, unit: UnitFile, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table.read_unit(unit, columns)


class BranchLoader:
    """The batches of one step distillation.

    Args:
        table: a pinned snapshot of TARGETS.
        guided: whether a step takes the guided branch (`snapfusion.training.step_distillation.is_guided_step`).
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: how rows are chosen. A row that is held out is a held-out draw: its latent may be trained on
            with other noise.
        counts: of `table.units`, what `pipelines.loading.buckets.count_training_rows` gave; None counts rows that all have one
            shape.

    Raises:
        ValueError: if there is no row to train on.
    """

    def __init__(
        self,
        table: UnitReader,
        *,
        guided: Callable[[int], bool],
        global_batch: int,
        seed: int,
        settings: LoaderSettings,
        counts: Sequence[RowCount] | None = None,
    ) -> None:
        self._guided = guided
        counted: list[RowCount] = list(counts or count_trainable(table, held_out=settings.held_out))
        if not any(map(total_rows, counted)):
            raise ValueError("there is no row to train on; the table is empty, or all of it is held out")
        self._loaders: dict[bool, BatchLoader | BucketLoader] = {}
        for branch, name in BRANCHES.items():
            mine = [index for index, file in enumerate(table.units) if is_guided_unit(file.unit) == branch]
            rows = [counted[index] for index in mine]
            if any(map(total_rows, rows)):
                self._loaders[branch] = make_loader(
                    _BranchUnits(table=table, units=[table.units[index] for index in mine]),
                    columns=(*COLUMNS, "w") if branch else COLUMNS,
                    global_batch=global_batch,
                    seed=noise_key(name, seed),
                    settings=settings,
                    counts=rows,
                )

    def batches(self, start: int, *, rank: int = 0, world: int = 1, depth: int = 2) -> BranchBatches:
        """This rank's share of global batch `start`, `start` + 1, ... without end. To be closed."""
        guided_before = sum(self._guided(step) for step in range(start))
        began = {True: guided_before, False: start - guided_before}
        cursors = {
            branch: loader.batches(began[branch], rank=rank, world=world, depth=depth)
            for branch, loader in self._loaders.items()
        }
        return BranchBatches(cursors, guided=self._guided, start=start)

    def held_out(self, *, guided: bool, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows of one branch in the table's own order, in batches of `rows`, at most `limit`."""
        if guided in self._loaders:
            yield from self._loaders[guided].held_out(rows=rows, limit=limit)


class BranchBatches:
    """The batches of successive steps, each from the cursor of its branch."""

    def __init__(
        self, cursors: dict[bool, Prefetcher[Batch]], *, guided: Callable[[int], bool], start: int
    ) -> None:
        self._cursors, self._guided, self._step = cursors, guided, start

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's.

        Raises:
            LoaderError: if the table has no row of the branch that the step takes.
        """
        branch = self._guided(self._step)
        if branch not in self._cursors:
            raise LoaderError(
                f"step {self._step} needs {BRANCHES[branch]} rows, and there are none to train on"
            )
        batch = next(self._cursors[branch])
        self._step += 1
        return batch

    def close(self) -> None:
        """End the cursors' threads."""
        for cursor in self._cursors.values():
            cursor.close()
