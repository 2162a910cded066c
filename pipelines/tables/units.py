"""The unit of work: a range of ordinals of one source, which becomes one data file.

A unit flows through the stages as one thing, so it can be lost, retried and committed as one thing. It is
bounded: `rows_per_unit` rows, small enough that its decoded pixels fit a Ray block (128 MiB).
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
"""Ray slices blocks above this; a unit's pixels stay below."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Ordinals [start, stop) of `source`; `final` if the source ends there. Letters as in `UnitManifest`."""

    name: str
    source: str
    start: int
    stop: int
    final: bool
    source_digest: str

    @property
    def rows_read(self) -> int:
        """How many rows of the source the unit covers."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """A unit's n decoded images, uint8 [H,W,3] each, beside their ids, source ids and captions."""

    unit: Unit
    ids: list[str]
    source_ids: list[str]
    captions: list[str]
    images: list[np.ndarray]
    rejections: list[Rejection]


@dataclass(frozen=True, kw_only=True)
class CaptionRows:
    """A unit's captions, to be drawn with the noise of `draw`, and what of its rows is no caption."""

    unit: Unit
    draw: int
    captions: list[Caption]
    rejections: list[Rejection]


@dataclass(frozen=True, kw_only=True)
class PromptRows:
    """A unit's captions, to be drawn at guidance `w` and judged, and what of its rows is no caption.

    `cut` names the blocks that the UNet goes without, `without`; it is empty where the UNet is whole.
    """

    unit: Unit
    w: float
    captions: list[Caption]
    rejections: list[Rejection]
    cut: str = ""
    without: tuple[str, ...] = ()

    def row_id(self, caption_id: str) -> str:
        """The id of a caption's row: a caption has one at each guidance, for each cut."""
        return f"{caption_id}@{self.w:g}-{self.cut}" if self.cut else f"{caption_id}@{self.w:g}"


@dataclass(frozen=True, kw_only=True)
class ImageNameRows:
    """A unit of pictures by name: their own, or their URL's."""

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
    """A unit after the model: columns as the table's schema names them, ready to be written."""

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
    """The rows whose numbers are finite, ready to be written; each other row is rejected as `not_finite`.

    Args:
        columns: of all rows.
        unit: they belong to.
        rows: the id and the ordinal of each.
        finite: which are.
        rejections: of the unit before it came here.
        environment: of the model.
        seconds: that it took.
    """
    bad = [
        Rejected("not_finite").record(id=id_, source=unit.source, ordinal=ordinal)
        for (id_, ordinal), good in zip(rows, finite, strict=True)
        if not good
    ]
    return FinishedRows(
        unit=unit,
        columns={name: keep_where(finite, values) for name, values in columns.items()},
        rejections=[*rejections, *bad],
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
    """What is left of ordinals [0, total), cut at multiples of `rows_per_unit` and at committed units.

    A source that has grown since its last, shorter unit was committed goes on after that unit.
    """
    stops = dict(committed)
    starts = sorted(stops)
    position = 0
    while position < total:
        if position in stops:
            position = stops[position]
            continue
        boundary = (position // rows_per_unit + 1) * rows_per_unit
        following = next((start for start in starts if start > position), total)
        stop = min(boundary, following, total)
        yield UncoveredRange(start=position, stop=stop, final=stop == total)
        position = stop


def committed_ranges(accounts: Iterable[UnitManifest], source: str) -> list[tuple[int, int]]:
    """The (start, stop) of the committed units of one source, ordered."""
    return sorted((account.start, account.stop) for account in accounts if account.source == source)


def group_by_shape(rows: Sequence[np.ndarray]) -> list[list[int]]:
    """The places of the rows of each shape, in their order; smaller shapes first.

    What a network is given in one batch is of one shape, and this depends on the unit alone.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.shape, []).append(place)
    return [places[shape] for shape in sorted(places)]


def finite_rows(values: Iterable[np.ndarray]) -> list[bool]:
    """Which rows hold neither NaN nor infinity."""
    return [bool(np.isfinite(row).all()) for row in values]


def keep_where(finite: list[bool], values: list | np.ndarray) -> list | np.ndarray:
    """The values, a list or array of n rows, whose flag is true."""
    if all(finite):
        return values
    if isinstance(values, np.ndarray):
        return values[np.array(finite)]
    return [value for value, good in zip(values, finite, strict=True) if good]
