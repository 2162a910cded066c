"""A shard to units of decoded images: stream the tar, select, decode, and set aside what cannot be used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np

from pipelines.rejection import Rejected, Rejection
from pipelines.sources.webdataset import Sample, Shard, ShardSettings, read_shard
from pipelines.stages.image import ImageSettings, decode_image
from pipelines.stages.isolation import Isolation
from pipelines.stages.select import Selection, check
from pipelines.stages.veto import Check, Veto
from pipelines.units import ImageRows, Unit

Decode = Callable[[bytes], np.ndarray]
"""Encoded bytes to uint8 [S,S,3]; raises Rejected."""


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


class ReadShard:
    """`ShardWork` in, `ImageRows` out, one for each unit that is not committed yet."""

    def __init__(
        self,
        *,
        size: int,
        rows_per_unit: int,
        shards: ShardSettings,
        images: ImageSettings,
        selection: Selection,
        vetoes: Sequence[Veto] = (),
    ) -> None:
        self.size = size
        self.rows_per_unit = rows_per_unit
        self.shards = shards
        self.selection = selection
        self.vetoes = tuple(vetoes)
        self.decode: Decode = partial(decode_image, size=size, settings=images)

    def __call__(self, work: ShardWork) -> Iterator[ImageRows]:
        """Stream the shard once; memory holds one unit."""
        yield from self._units(work, self.decode)

    def carefully(self, work: ShardWork) -> Iterator[ImageRows]:
        """The same after a worker died on this shard: each image is decoded in a process of its own.

        An image that takes that process down is rejected as crashed; the others go through.
        """
        # One try ended the worker; these make up the three.
        with Isolation(self.decode, tries=2) as isolated:
            yield from self._units(work, isolated)

    def _units(self, work: ShardWork, decode: Decode) -> Iterator[ImageRows]:
        rows = (row for row in read_shard(work.shard, self.shards) if not work.holds(row.ordinal))
        checks = [veto.on(work.shard) for veto in self.vetoes]
        waiting: ImageRows | None = None
        for _, group in groupby(rows, key=lambda row: row.ordinal // self.rows_per_unit):
            # One unit behind, because only the end of the shard tells which unit is the final one.
            if waiting is not None:
                yield waiting
            waiting = self._unit(work, list(group), decode, checks)
        if waiting is None and not work.committed:
            waiting = self._unit(work, [], decode, checks)
        if waiting is not None:
            yield replace(waiting, unit=replace(waiting.unit, final=True))

    def _unit(
        self, work: ShardWork, rows: list[Sample | Rejection], decode: Decode, checks: Sequence[Check]
    ) -> ImageRows:
        kept: list[tuple[Sample, np.ndarray]] = []
        rejections: list[Rejection] = []
        for row in rows:
            id_ = f"{work.prefix}/{row.id}"
            try:
                kept.append(self._row(row, decode, checks, id_=id_))
            except Rejected as verdict:
                rejections.append(verdict.record(id=id_, source=work.source, ordinal=row.ordinal))
        images = [image for _, image in kept]
        return ImageRows(
            unit=work.unit(start=rows[0].ordinal if rows else 0, stop=rows[-1].ordinal + 1 if rows else 0),
            ids=[f"{work.prefix}/{sample.id}" for sample, _ in kept],
            source_ids=[sample.source_id for sample, _ in kept],
            captions=[sample.caption for sample, _ in kept],
            images=np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8),
            rejections=rejections,
        )

    def _row(
        self, row: Sample | Rejection, decode: Decode, checks: Sequence[Check], *, id_: str
    ) -> tuple[Sample, np.ndarray]:
        if isinstance(row, Rejection):
            raise Rejected(row.reason, row.detail)
        check(row.metadata, caption=row.caption, selection=self.selection)
        for check_row in checks:
            check_row(row, id_)
        return row, decode(row.image)
