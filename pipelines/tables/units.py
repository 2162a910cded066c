"""Units of work: a range of ordinals of one source, which becomes one data file.

A unit passes through all stages as one object, so it is lost, retried and committed as a whole. Its size is
bounded by `rows_per_unit`, so that its decoded pixels fit one Ray block (128 MiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.captions import Caption
from pipelines.tables.manifest import UnitManifest

MAX_UNIT_BYTES = 128 * 2**20
"""Upper bound of a unit's pixels: Ray slices blocks that are larger."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Ordinals [start, stop) of `source`; `final` if the source ends there. Fields as in `UnitManifest`."""

    name: str
    source: str
    start: int
    stop: int
    final: bool
    source_digest: str

    @property
    def rows_read(self) -> int:
        """Rows of the source that the unit covers."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """A unit's n decoded images, uint8 [H,W,3] each, with their ids, source ids and captions."""

    unit: Unit
    ids: list[str]
    source_ids: list[str]
    captions: list[str]
    images: list[np.ndarray]
    rejections: list[Rejection]


@dataclass(frozen=True, kw_only=True)
class CaptionRows:
    """A unit's captions, to be generated from the noise of number `draw`, and its rejected rows."""

    unit: Unit
    draw: int
    captions: list[Caption]
    rejections: list[Rejection]


@dataclass(frozen=True, kw_only=True)
class PromptRows:
    """A unit's captions, to be generated at guidance `w` and scored, and its rejected rows.

    `without` are the blocks left out of the UNet and `cut` names them; both are empty for the whole UNet.
    """

    unit: Unit
    w: float
    captions: list[Caption]
    rejections: list[Rejection]
    cut: str = ""
    without: tuple[str, ...] = ()

    def row_id(self, caption_id: str) -> str:
        """The id of a caption's row, one for each guidance and cut."""
        return f"{caption_id}@{self.w:g}-{self.cut}" if self.cut else f"{caption_id}@{self.w:g}"


@dataclass(frozen=True, kw_only=True)
class ImageNameRows:
    """A unit of images that are named by path or URL."""

    unit: Unit
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class LatentRows:
    """A unit's n latents, float16 [4,h,w] each, and token ids int32 [n,L], to be given targets.

    `draw` is the number of their noise, `guided` the branch of SnapFusion Eq. 11 that all of them belong to.
    """

    unit: Unit
    draw: int
    guided: bool
    ids: list[str]
    source_ids: list[str]
    token_ids: np.ndarray
    latents: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FinishedRows:
    """A unit after the model: its columns as in the table's schema, ready to be written."""

    unit: Unit
    columns: dict[str, Any]
    rejections: list[Rejection]
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def finish_unit(
    columns: Mapping[str, Any],
    *,
    unit: Unit,
    rows: Iterable[tuple[str, int]],
    finite: list[bool],
    rejections: Iterable[Rejection] = (),
    environment: dict[str, Any],
    seconds: float,
) -> FinishedRows:
    """The rows with finite values, ready to be written; the others are rejected as `not_finite`.

    Args:
        columns: of all rows.
        unit: the rows' unit.
        rows: id and ordinal of each row.
        finite: whether each row is finite.
        rejections: of the unit so far.
        environment: of the model.
        seconds: spent on the unit.
    """
    not_finite = [
        Rejected("not_finite").record(id=id_, source=unit.source, ordinal=ordinal)
        for (id_, ordinal), is_finite in zip(rows, finite, strict=True)
        if not is_finite
    ]
    return FinishedRows(
        unit=unit,
        columns={name: keep_where(finite, values) for name, values in columns.items()},
        rejections=[*rejections, *not_finite],
        environment=environment,
        seconds=seconds,
    )


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
        boundary = (position // rows_per_unit + 1) * rows_per_unit
        next_start = next((start for start in starts if start > position), total)
        stop = min(boundary, next_start, total)
        yield UncoveredRange(start=position, stop=stop, final=stop == total)
        position = stop


def committed_ranges(manifests: Iterable[UnitManifest], source: str) -> list[tuple[int, int]]:
    """The sorted (start, stop) of the committed units of one source."""
    return sorted((manifest.start, manifest.stop) for manifest in manifests if manifest.source == source)


def group_by_shape(rows: Sequence[np.ndarray]) -> list[list[int]]:
    """The indices of the rows of each shape, in their order; smaller shapes first.

    A network's batch has one shape. Grouping within the unit keeps batches, and so bits, independent of
    whatever else is processed.
    """
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row.shape, []).append(index)
    return [indices[shape] for shape in sorted(indices)]


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
