"""A shard to units of decoded images: stream the tar, select, decode, and set aside what cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, Shard, read_shard
from pipelines.stages.crop import Shape
from pipelines.stages.image import CropImage, EncodedImage
from pipelines.stages.isolation import Isolation
from pipelines.stages.row_filter import RowCheck, RowFilter
from pipelines.stages.select import check
from pipelines.stages.settings import ImageSettings, Selection
from pipelines.tables.units import ImageRows, Unit

Decoded = TypeVar("Decoded")
Gathered = TypeVar("Gathered")
Decode = Callable[[EncodedImage], Decoded]
"""What is made of encoded bytes; raises Rejected."""


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """A shard of which some units may be committed already.

    Attributes:
        shard: the tar.
        source: the name its units and rows go by: `<name of the source>/<name of the shard>`.
        committed: (start, stop) of the units that need not be made again.
    """

    shard: Shard
    source: str
    committed: tuple[tuple[int, int], ...]

    def holds(self, ordinal: int) -> bool:
        """Whether a committed unit covers this row."""
        return any(start <= ordinal < stop for start, stop in self.committed)

    @property
    def prefix(self) -> str:
        """The name of the source, first part of every row's id."""
        return self.source.split("/", 1)[0]

    def unit(self, *, start: int, stop: int) -> Unit:
        """The unit of ordinals [start, stop), not known to be final; its name is fit for a file."""
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", self.source.replace("/", "-"))
        if stem != self.source.replace("/", "-", 1):
            # Two names may have become one.
            stem = f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"
        return Unit(
            name=f"{stem}-{start:06d}-{stop:06d}",
            source=self.source,
            start=start,
            stop=stop,
            final=False,
            source_digest=shard_digest(self.shard),
        )


def shard_digest(shard: Shard) -> str:
    """What tells a shard from another of its name: SHA-256 of name and size."""
    return hashlib.sha256(f"{shard.name}\x1f{shard.size}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Usable(Generic[Decoded]):
    """A row that passed selection, vetoes and decoder.

    Attributes:
        id: of the row, `<source>/<sample.id>`.
        sample: as the shard has it; it holds the encoded picture, so who keeps many rows keeps none of them.
        picture: what the decoder made.
    """

    id: str
    sample: Sample
    picture: Decoded


@dataclass(frozen=True, kw_only=True)
class UsableRows:
    """Which rows of a shard are usable, unit by unit, whatever is made of them.

    Attributes:
        rows_per_unit: ordinals of one unit.
        shards: bounds on what is read.
        selection: which rows are wanted.
        vetoes: what refuses rows beside it.
    """

    rows_per_unit: int
    shards: ShardSettings
    selection: Selection
    vetoes: tuple[RowFilter, ...] = ()

    def units(
        self,
        work: ShardWork,
        *,
        decode: Decode[Decoded],
        gather: Callable[[Iterator[Usable[Decoded] | Rejection]], Gathered],
        careful: bool = False,
    ) -> Iterator[tuple[Unit, Gathered]]:
        """Stream the shard once; each unit that is not committed, with what `gather` made of its rows.

        Args:
            work: the shard.
            decode: of the encoded picture; what it makes is in the row.
            gather: takes the rows of a unit as they are read.
            careful: after a worker died on this shard: each picture is decoded in a process of its own. One
                that takes that process down is rejected as crashed; the others go through.
        """
        if not careful:
            yield from self._units(work, decode, gather)
            return
        # One try ended the worker; these make up the three.
        with Isolation(decode, tries=2) as isolated:
            yield from self._units(work, isolated, gather)

    def _units(
        self,
        work: ShardWork,
        decode: Decode[Decoded],
        gather: Callable[[Iterator[Usable[Decoded] | Rejection]], Gathered],
    ) -> Iterator[tuple[Unit, Gathered]]:
        rows = (row for row in read_shard(work.shard, self.shards) if not work.holds(row.ordinal))
        checks = [veto.on(work.shard) for veto in self.vetoes]
        waiting: tuple[Unit, Gathered] | None = None
        for _, group in groupby(rows, key=lambda row: row.ordinal // self.rows_per_unit):
            # One unit behind, because only the end of the shard tells which unit is the final one.
            if waiting is not None:
                yield waiting
            span = _Span()
            gathered = gather(self._judge(work, row, decode, checks) for row in span.over(group))
            waiting = work.unit(start=span.start, stop=span.stop), gathered
        if waiting is None and not work.committed:
            waiting = work.unit(start=0, stop=0), gather(iter(()))
        if waiting is not None:
            unit, gathered = waiting
            yield replace(unit, final=True), gathered

    def _judge(
        self, work: ShardWork, row: Sample | Rejection, decode: Decode[Decoded], checks: Sequence[RowCheck]
    ) -> Usable[Decoded] | Rejection:
        id_ = f"{work.prefix}/{row.id}"
        try:
            if isinstance(row, Rejection):
                raise Rejected(row.reason, row.detail)
            check(row.metadata, caption=row.caption, selection=self.selection)
            for check_row in checks:
                check_row(row, id_)
            return Usable(id=id_, sample=row, picture=decode(EncodedImage(row.image, row=id_)))
        except Rejected as verdict:
            return verdict.record(id=id_, source=work.source, ordinal=row.ordinal)


@dataclass
class _Span:
    """The ordinals [start, stop) of the rows that went by."""

    start: int = 0
    stop: int = 0

    def over(self, rows: Iterator[Sample | Rejection]) -> Iterator[Sample | Rejection]:
        """The rows, remembered."""
        for row in rows:
            if self.stop == 0:
                self.start = row.ordinal
            self.stop = row.ordinal + 1
            yield row


class ReadShard:
    """`ShardWork` in, `ImageRows` out, one for each unit that is not committed yet.

    Args:
        shapes: the (height, width) that pictures become, each the one nearest to its aspect.
        rows_per_unit: rows of one unit.
        shards: bounds on what is read.
        images: bounds on pictures, and how they are cropped.
        selection: which rows are wanted.
        vetoes: what else refuses rows.
    """

    def __init__(
        self,
        *,
        shapes: Sequence[Shape],
        rows_per_unit: int,
        shards: ShardSettings,
        images: ImageSettings,
        selection: Selection,
        vetoes: Sequence[RowFilter] = (),
    ) -> None:
        self.rows = UsableRows(
            rows_per_unit=rows_per_unit, shards=shards, selection=selection, vetoes=tuple(vetoes)
        )
        self.decode: Decode[np.ndarray] = CropImage(settings=images, shapes=tuple(shapes))

    def __call__(self, work: ShardWork, *, careful: bool = False) -> Iterator[ImageRows]:
        """Stream the shard once; memory holds one unit."""
        units = self.rows.units(work, decode=self.decode, gather=self._gather, careful=careful)
        for unit, columns in units:
            yield ImageRows(unit=unit, **columns)

    def isolated(self, work: ShardWork) -> Iterator[ImageRows]:
        """The same after a worker died on this shard."""
        return self(work, careful=True)

    def _gather(self, rows: Iterator[Usable[np.ndarray] | Rejection]) -> dict[str, Any]:
        rejections: list[Rejection] = []
        kept: list[tuple[str, str, str, np.ndarray]] = []
        for row in rows:
            if isinstance(row, Rejection):
                rejections.append(row)
            else:
                kept.append((row.id, row.sample.source_id, row.sample.caption, row.picture))
        return {
            "ids": [id_ for id_, *_ in kept],
            "source_ids": [source_id for _, source_id, _, _ in kept],
            "captions": [caption for _, _, caption, _ in kept],
            "images": [image for *_, image in kept],
            "rejections": rejections,
        }
