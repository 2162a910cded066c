"""Loads TARGETS as the batches of Eq. 11, with one cursor over vanilla and one over guided rows.

A step is guided or not for all ranks and all rows at once, so each branch has its own units and its own
cursor. The step alone decides which branch it takes. How far each cursor has come then follows from the
position, so a restart needs no further state.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import pyarrow.compute as pc

from pipelines.loading.buckets import RowCount, TableLoader, make_loader, total_rows
from pipelines.loading.loader import InterleavedLoader, UnitReader, UnitSubset, count_trainable
from pipelines.loading.rows import LoaderError
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.unit_files import UnitList
from snapfusion.noise import noise_key
from snapfusion.training.batch import Batch
from snapfusion.training.settings import BRANCHES

COLUMNS: Final = ("latent", "token_ids", "noise_key", "interval", "t", "t2", "k", "x_target")
"""The columns of every batch; a guided batch has `w` besides."""

_NAME = re.compile(r"(?P<branch>vanilla|guided)-d(?P<draw>\d{4,})-.")


def unit_name(parent: str, *, draw: int, guided: bool) -> str:
    """The name of the unit made from the LATENTS unit `parent`; it begins with the branch."""
    return f"{BRANCHES[guided]}-d{draw:04d}-{parent}"


def branch_and_draw(name: str) -> tuple[bool, int]:
    """Whether a unit's rows are guided, and the number of their draw, from its name.

    Raises:
        LoaderError: if it is not a unit of TARGETS.
    """
    found = _NAME.match(name)
    if found is None:
        raise LoaderError(f"unit {name} is not named as in TARGETS: 'guided-d0003-' and the LATENTS unit")
    return found["branch"] == BRANCHES[True], int(found["draw"])


class TargetsReader(UnitReader, Protocol):
    """The part of a snapshot of TARGETS that is used here."""

    @property
    def units(self) -> UnitList:
        """The files, ordered by unit."""


def guided_units(units: UnitList) -> np.ndarray:
    """Whether each unit's rows are guided, from its name, bool [n].

    Raises:
        LoaderError: if one of them is not a unit of TARGETS.
    """
    names = units.unit_names
    named = pc.match_substring_regex(names, f"^{_NAME.pattern}")
    if not pc.all(named).as_py():
        branch_and_draw(names[pc.index(named, value=False).as_py()].as_py())
    return pc.starts_with(names, BRANCHES[True]).to_numpy(zero_copy_only=False)


def count_branch_rows(table: TargetsReader, *, guided: bool) -> int:
    """Committed rows of one branch."""
    return int(table.units.rows[guided_units(table.units) == guided].sum())


class BranchLoader(InterleavedLoader[str]):
    """The batches of one step distillation.

    Args:
        table: a pinned snapshot of TARGETS.
        guided: whether a step is guided (`snapfusion.training.step_distillation.is_guided_step`).
        global_batch: rows of a step, over all ranks.
        seed: of the order.
        settings: the choice and order of rows. A held-out row is a held-out draw: its latent may be trained
            on with other noise.
        counts: the result of `count_training_rows` for `table`; None counts rows that all have one shape.

    Raises:
        ValueError: if there are no rows to train on.
    """

    def __init__(
        self,
        table: TargetsReader,
        *,
        guided: Callable[[int], bool],
        global_batch: int,
        seed: int,
        settings: LoaderSettings,
        counts: Sequence[RowCount] | None = None,
    ) -> None:
        self._guided = guided
        counts = counts or count_trainable(table, held_out=settings.held_out)
        if not any(map(total_rows, counts)):
            raise ValueError("there are no rows to train on; the table is empty, or all of it is held out")
        self.loaders: dict[str, TableLoader] = {}
        of_branch = guided_units(table.units)
        for branch, name in BRANCHES.items():
            indices = np.flatnonzero(of_branch == branch)
            branch_counts = [counts[index] for index in indices.tolist()]
            if any(map(total_rows, branch_counts)):
                self.loaders[name] = make_loader(
                    UnitSubset(table=table, units=table.units.take(indices)),
                    columns=(*COLUMNS, "w") if branch else COLUMNS,
                    global_batch=global_batch,
                    # Of its own, or both branches would read their units in the same order.
                    seed=noise_key(name, seed),
                    settings=settings,
                    counts=branch_counts,
                )

    def key_at(self, step: int) -> str:
        """The branch of a step."""
        return BRANCHES[self._guided(step)]

    def held_out(self, *, guided: bool, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out rows of one branch in the table's order, in batches of `rows`, at most `limit`."""
        if loader := self.loaders.get(BRANCHES[guided]):
            yield from loader.held_out(rows=rows, limit=limit)
