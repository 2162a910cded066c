"""Streams a shard into units of decoded images; rejects rows that cannot be used."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Generic, TypeVar

import numpy as np

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.settings import ShardSettings
from pipelines.sources.tears import Tear
from pipelines.sources.webdataset import Sample
from pipelines.stages.bounded_decode import BoundedDecode
from pipelines.stages.crop import Shape
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.stages.image import CropImage, EncodedImage
from pipelines.stages.isolation import Isolation
from pipelines.stages.row_filter import RowCheck, RowFilter
from pipelines.stages.select import check
from pipelines.stages.settings import ImageSettings, Selection
from pipelines.stages.shard_work import ShardWork
from pipelines.tables.deletion_list import redacted_id
from pipelines.tables.units import ImageRows, Unit

Decoded = TypeVar("Decoded")
Output = TypeVar("Output")
Decode = Callable[[EncodedImage], Decoded]
"""Decodes the bytes of an image; raises `Rejected`."""


@dataclass(kw_only=True)
class ShardReader(ABC, Generic[Decoded, Output]):
    """Base of the stages that stream a shard: selects and decodes rows, and emits one output per unit.

    Attributes:
        rows_per_unit: ordinals of one unit.
        shards: bounds on what is read.
        selection: bounds on metadata and captions.
        filters: reject rows beside the selection.
        decode_seconds: for one image; see `BoundedDecode`.
        decode: of the encoded image; set by the subclass.
    """

    rows_per_unit: int
    shards: ShardSettings
    selection: Selection
    filters: Sequence[RowFilter] = ()
    decode_seconds: float = 60.0
    decode: Decode[Decoded] = field(init=False)

    @abstractmethod
    def row(self, id_: str, sample: Sample, decoded: Decoded) -> tuple[Any, ...]:
        """The values kept of a usable row; not the sample, because it holds the encoded image."""

    @abstractmethod
    def output(self, unit: Unit, rows: list[tuple[Any, ...]], rejections: list[Rejection]) -> Output:
        """The output of a unit, made of its usable and rejected rows."""

    def __call__(self, work: ShardWork, *, isolate: bool = False) -> Iterator[Output]:
        """Stream the shard once; memory holds one unit.

        Args:
            work: the shard, and which of its units are committed.
            isolate: decode in a child process; an image that kills it is rejected as `crashed`, and the
                others go through.
        """
        if not isolate:
            with BoundedDecode(self.decode, seconds=self.decode_seconds) as bounded:
                yield from self._outputs(work, bounded)
            return
        # The worker that died was the first of three tries.
        with Isolation(self.decode, timeout=self.decode_seconds, tries=2) as decode:
            yield from self._outputs(work, decode)

    def isolated(self, work: ShardWork) -> Iterator[Output]:
        """Stream with isolation, after a worker died on this shard."""
        return self(work, isolate=True)

    def _outputs(self, work: ShardWork, decode: Decode[Decoded]) -> Iterator[Output]:
        tears: list[Tear] = []
        samples = work.read(self.shards, on_tear=tears.append)
        # Per shard, because a filter may read a table of verdicts, of which it holds this shard's part.
        checks: list[RowCheck] = [self._select]
        for row_filter in self.filters:
            check_row = row_filter.for_shard(work.shard)
            # A row on the deletion list is withheld, whatever else would reject it: its id is not recorded.
            is_deletion = isinstance(row_filter, DeletionFilter | RecordedDeletionFilter)
            checks.insert(0 if is_deletion else len(checks), check_row)
        waiting: tuple[Unit, list[tuple[Any, ...]], list[Rejection]] | None = None
        # Units are ranges of ordinals, not of usable rows: selection and filters do not move their borders.
        for _, group in groupby(samples, key=lambda row: row.ordinal // self.rows_per_unit):
            # One unit behind, because only the end of the shard tells which unit is the final one.
            if waiting is not None:
                yield self.output(*waiting)
            read = [(sample.ordinal, self._read_row(work, sample, decode, checks)) for sample in group]
            rows = [row for _, row in read if not isinstance(row, Rejection)]
            rejections = [row for _, row in read if isinstance(row, Rejection)]
            waiting = work.unit(start=read[0][0], stop=read[-1][0] + 1), rows, rejections
        if waiting is None and not work.is_begun:
            # A shard without rows is one empty unit, so that it counts as read.
            waiting = work.unit(start=work.start, stop=work.start), [], []
        if waiting is not None:
            unit, rows, rejections = waiting
            final = replace(unit, final=True, tear=tears[0] if tears else None)
            yield self.output(final, rows, rejections)

    def _read_row(
        self, work: ShardWork, sample: Sample | Rejection, decode: Decode[Decoded], checks: Sequence[RowCheck]
    ) -> tuple[Any, ...] | Rejection:
        id_ = f"{work.prefix}/{sample.id}"
        try:
            if isinstance(sample, Rejection):
                raise Rejected(sample.reason, sample.detail)
            # Cheap checks first: decoding takes most of the time.
            for check_row in checks:
                check_row(sample, id_)
            return self.row(id_, sample, decode(EncodedImage(sample.image, row=id_)))
        except Rejected as rejected:
            if rejected.reason == "withheld":
                id_ = redacted_id(id_)
            return rejected.record(id=id_, source=work.source, ordinal=sample.ordinal)

    def _select(self, sample: Sample, _row_id: str) -> None:
        check(sample.metadata, caption=sample.caption, selection=self.selection)


@dataclass(kw_only=True)
class ReadShard(ShardReader[np.ndarray, ImageRows]):
    """Turns `ShardWork` into `ImageRows`, one for each unit that is not committed yet.

    Attributes:
        shapes: the (height, width) that images are cropped to, each to the one nearest to its aspect.
        images: bounds on images, and how they are cropped.
    """

    shapes: Sequence[Shape]
    images: ImageSettings

    def __post_init__(self) -> None:
        self.decode = CropImage(settings=self.images, shapes=tuple(self.shapes))

    def row(self, id_: str, sample: Sample, decoded: np.ndarray) -> tuple[Any, ...]:
        """Id, source id, caption and image."""
        return id_, sample.source_id, sample.caption, decoded

    def output(self, unit: Unit, rows: list[tuple[Any, ...]], rejections: list[Rejection]) -> ImageRows:
        """The unit's images."""
        names = ("ids", "source_ids", "captions", "images")
        columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
        return ImageRows(unit=unit, rejections=rejections, **columns)
