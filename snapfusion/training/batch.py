"""A batch of table rows as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a table.

    Attributes:
        ids: ids of the rows, which error messages name.
        columns: one tensor per column, [B, ...]; row i belongs to ids[i].

    Raises:
        ValueError: if the number of rows of a column differs from the number of ids.
    """

    ids: tuple[str, ...]
    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.ids):
                raise ValueError(f"column {name!r} has {len(column)} rows for {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> Tensor:
        """Return a column.

        Raises:
            ValueError: if the batch has no such column.
        """
        if name not in self.columns:
            raise ValueError(f"the batch has no column {name!r}; it has {sorted(self.columns)}")
        return self.columns[name]

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield the batch in pieces of at most `rows` rows, in order."""
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            columns = {name: column[part] for name, column in self.columns.items()}
            yield Batch(ids=self.ids[part], columns=columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> Batch:
        """Return the batch with more columns."""
        return Batch(ids=self.ids, columns={**self.columns, **columns})

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        return Batch(ids=self.ids, columns=columns)
