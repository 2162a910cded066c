"""Units of work: a range of ordinals of one source, which becomes one data file.

A unit passes through all stages as one object, so it is lost, retried and committed as a whole. Its size is
bounded by `rows_per_unit`, so that its decoded pixels fit one Ray block (128 MiB).
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.captions import Caption
from pipelines.tables.manifest import SourceRange, UnitManifest
from pipelines.tables.network_time import UnitSpan

MAX_UNIT_BYTES = 128 * 2**20
"""Upper bound of a unit's pixels: Ray slices blocks that are larger."""


@dataclass(frozen=True, kw_only=True)
class Unit(SourceRange):
    """A range of a source and its name, the `unit` of its `UnitManifest`."""

    name: str

    @property
    def rows_read(self) -> int:
        """Number of rows of the source that the unit covers."""
        return self.stop - self.start

    @classmethod
    def of(cls, manifest: UnitManifest) -> Unit:
        """The unit that a committed manifest describes."""
        return cls(name=manifest.unit, **manifest.range_values())

    def manifest(
        self,
        *,
        settings: str,
        environment: dict[str, Any],
        rows_read: int,
        rows_written: int,
        rejections: Iterable[Rejection] = (),
    ) -> UnitManifest:
        """The manifest of the unit once its rows are made; see `UnitManifest`."""
        return UnitManifest(
            **self.range_values(),
            unit=self.name,
            settings=settings,
            environment=environment,
            rows_read=rows_read,
            rows_written=rows_written,
            rejections=tuple(rejections),
        )


@dataclass(frozen=True, kw_only=True)
class UnitRows(ABC):
    """The rows of a unit on their way through the stages, and those that were rejected before."""

    unit: Unit
    rejections: list[Rejection] = field(default_factory=list)

    @abstractmethod
    def row_keys(self) -> list[tuple[str, int]]:
        """The id in the table and the ordinal of each row."""

    def finish(
        self, columns: Mapping[str, Any], *, finite: list[bool], environment: dict[str, Any], span: UnitSpan
    ) -> FinishedRows:
        """The rows whose numbers are finite; each other row is rejected as `not_finite`.

        Args:
            columns: of all rows.
            finite: one flag a row.
            environment: of the model.
            span: of the model's work.
        """
        return FinishedRows(
            unit=self.unit,
            columns={name: keep_where(finite, values) for name, values in columns.items()},
            rejections=[*self.rejections, *self._rejected(Rejected("not_finite"), finite)],
            environment=environment,
            seconds=span.seconds,
            span=span,
        )

    def reject_all(self, columns: Iterable[str]) -> FinishedRows:
        """An empty unit with these columns: every row is rejected as `crashed`, and still counted."""
        crashed = Rejected("crashed", "the worker died at every attempt")
        rejections = [*self.rejections, *self._rejected(crashed, [False] * len(self.row_keys()))]
        return FinishedRows(unit=self.unit, columns={name: [] for name in columns}, rejections=rejections)

    def _rejected(self, reason: Rejected, accepted: list[bool]) -> list[Rejection]:
        return [
            reason.record(id=id_, source=self.unit.source, ordinal=ordinal)
            for (id_, ordinal), good in zip(self.row_keys(), accepted, strict=True)
            if not good
        ]


@dataclass(frozen=True, kw_only=True)
class ImageRows(UnitRows):
    """n decoded images, uint8 [H,W,3] each, with their ids, source ids and captions."""

    ids: list[str]
    source_ids: list[str]
    captions: list[str]
    images: list[np.ndarray]

    def row_keys(self) -> list[tuple[str, int]]:
        """Ids, and the ordinal of the unit's first row: the decoder does not pass ordinals on."""
        return [(id_, self.unit.start) for id_ in self.ids]


@dataclass(frozen=True, kw_only=True)
class CaptionRows(UnitRows):
    """Captions, to be sampled from the noise number `draw`."""

    draw: int
    captions: list[Caption]

    def row_keys(self) -> list[tuple[str, int]]:
        """Ids of the draw's rows and ordinals of their captions."""
        return [(f"{caption.id}#{self.draw}", caption.ordinal) for caption in self.captions]


@dataclass(frozen=True, kw_only=True)
class PromptRows(UnitRows):
    """Captions, to be sampled at guidance `w` and scored.

    `cut` names the list `without` of blocks that the UNet skips; both are empty for the whole UNet.
    """

    w: float
    captions: list[Caption]
    cut: str = ""
    without: tuple[str, ...] = ()

    def row_id(self, caption_id: str) -> str:
        """The id of a caption's row: one for each guidance and cut."""
        return f"{caption_id}@{self.w:g}-{self.cut}" if self.cut else f"{caption_id}@{self.w:g}"

    def row_keys(self) -> list[tuple[str, int]]:
        """Row ids and ordinals of the captions."""
        return [(self.row_id(caption.id), caption.ordinal) for caption in self.captions]


@dataclass(frozen=True, kw_only=True)
class ImageNameRows(UnitRows):
    """Images by name: a URL, or the number of a scene."""

    names: list[str]

    def row_keys(self) -> list[tuple[str, int]]:
        """Names and ordinals."""
        return [(name, self.unit.start + index) for index, name in enumerate(self.names)]


@dataclass(frozen=True, kw_only=True)
class LatentRows(UnitRows):
    """n latents, float16 [4,h,w] each, and token ids int32 [n,L], for which targets are to be computed.

    `draw` is the number of their noise, `guided` the branch of SnapFusion Eq. 11 that all of them belong to.
    """

    draw: int
    guided: bool
    ids: list[str]
    source_ids: list[str]
    token_ids: np.ndarray
    latents: list[np.ndarray]

    def row_keys(self) -> list[tuple[str, int]]:
        """Ids of the draw's rows and ordinals within the unit of LATENTS."""
        return [(f"{id_}#{self.draw}", ordinal) for ordinal, id_ in enumerate(self.ids)]


@dataclass(frozen=True, kw_only=True)
class FinishedRows:
    """A unit after the model: its columns as in the table's schema, ready to be written."""

    unit: Unit
    columns: dict[str, Any]
    rejections: list[Rejection]
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    span: UnitSpan | None = None


@dataclass(frozen=True, kw_only=True)
class UncoveredRange:
    """Ordinals [start, stop) that no committed unit covers; `final` if they reach the known end."""

    start: int
    stop: int
    final: bool


def uncovered_ranges(
    total: int, *, committed: Iterable[tuple[int, int]], rows_per_unit: int
) -> Iterator[UncoveredRange]:
    """The ordinals of [0, total) without a unit, cut at multiples of `rows_per_unit` and at committed units.

    A source that has grown since its last, shorter unit was committed continues after that unit.
    """
    stops = dict(committed)
    starts = sorted(stops)
    position = 0
    while position < total:
        if position in stops:
            position = stops[position]
            continue
        # Boundaries are multiples from the source's start, whatever is committed: names of units are stable.
        boundary = (position // rows_per_unit + 1) * rows_per_unit
        following = bisect.bisect_right(starts, position)
        next_start = starts[following] if following < len(starts) else total
        stop = min(boundary, next_start, total)
        yield UncoveredRange(start=position, stop=stop, final=stop == total)
        position = stop


def committed_ranges(manifests: Iterable[UnitManifest], source: str) -> list[tuple[int, int]]:
    """The sorted (start, stop) of the committed units of one source."""
    return sorted((manifest.start, manifest.stop) for manifest in manifests if manifest.source == source)


def shape_batches(rows: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Indices of at most `batch_size` rows of one shape each, in order; smaller shapes first.

    Bits depend on a network's batch, and the batches follow from the unit alone.
    """
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row.shape, []).append(index)
    for shape in sorted(indices):
        for start in range(0, len(indices[shape]), batch_size):
            yield indices[shape][start : start + batch_size]


def finite_rows(values: Iterable[np.ndarray]) -> list[bool]:
    """Whether each row has neither NaN nor infinity."""
    return [bool(np.isfinite(row).all()) for row in values]


def keep_where(finite: list[bool], values: list | np.ndarray) -> list | np.ndarray:
    """The values, a list or array of n rows, whose flag is true."""
    if all(finite):
        return values
    if isinstance(values, np.ndarray):
        return values[np.array(finite)]
    return [value for value, is_finite in zip(values, finite, strict=True) if is_finite]
