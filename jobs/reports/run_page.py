"""What the report of a run says, and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jobs.reports.charts import Chart
from jobs.reports.latency_breakdown import LatencyBreakdown
from jobs.reports.page import render_page
from snapfusion.export.parity import psnr

DIFFERENCE_FACTOR = 8
"""How much difference pictures are amplified."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """An image with its caption.

    Attributes:
        image: uint8 [H,W,3].
        caption: what it should show.
        note: a second, smaller line, for example what the oracle reads in it.
    """

    image: np.ndarray
    caption: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparedImage:
    """A picture held against another, both uint8 [H,W,3].

    Attributes:
        name: of what drew it.
        image: what it drew.
        reference: what it should have drawn.
    """

    name: str
    image: np.ndarray
    reference: np.ndarray

    @cached_property
    def difference(self) -> np.ndarray:
        """|image - reference|, `DIFFERENCE_FACTOR` times, uint8 [H,W,3]."""
        distance = np.abs(self.image.astype(np.int32) - self.reference.astype(np.int32))
        return np.clip(distance * DIFFERENCE_FACTOR, 0, 255).astype(np.uint8)

    @property
    def psnr_db(self) -> float:
        """To the reference, on these 8-bit images, peak 255."""
        return psnr(self.image, self.reference, peak=255.0)


@dataclass(frozen=True, kw_only=True)
class ImageComparison:
    """One caption drawn in several ways, of which the first is the one to be met.

    Attributes:
        caption: the text.
        name: of the reference.
        reference: uint8 [H,W,3].
        held: the others.
    """

    caption: str
    name: str
    reference: np.ndarray
    held: tuple[ComparedImage, ...]


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """One way to draw, and its figures over all captions.

    Attributes:
        name: "teacher", "undistilled" or "student".
        steps: it takes.
        attributes_right: share of the captions' attributes that the oracle finds.
        all_attributes_right: share of the pictures in which it finds all.
        clip: mean score of picture and caption.
        distance: of its pixels to the teacher's, root mean square, in gray levels of 255.
    """

    name: str
    steps: int
    attributes_right: float
    all_attributes_right: float
    clip: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One caption from one noise; a picture for each way, whose caption says which."""

    caption: str
    pictures: tuple[CaptionedImage, ...]


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """A student beside its teacher, and beside itself before it was distilled.

    Attributes:
        guidance: w of all pictures.
        count: captions behind the figures.
        ways: teacher, undistilled, student.
        strips: some of the captions.
    """

    guidance: float
    count: int
    ways: tuple[ModelMetrics, ...]
    strips: tuple[SampleRow, ...]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number with what it takes to trust it.

    Attributes:
        name: what is measured.
        value: the number.
        unit: "dB", "ms"; empty for a plain number.
        count: of how many things it is the mean or total.
        counted: what those are, for example "held-out pairs".
        seed: behind their choice; None where chance plays no part.
        note: how it was measured, or what it is held to.
    """

    name: str
    value: float
    unit: str = ""
    count: int
    counted: str
    seed: int | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class MobileVariant:
    """A variant of the programs for phones.

    Attributes:
        name: of the variant.
        kind: its format and arithmetic.
        bytes: its size.
        psnr_db: of each module, by name, and of the "images"; None for what agrees bit for bit.
        limit_db: of the images, below which it would not be here.
        override: why it is here although it is below; empty where it is not.
        samples: how many captions were drawn.
        how: by what means it was compared.
    """

    name: str
    kind: str
    bytes: int
    psnr_db: Mapping[str, float | None]
    limit_db: float
    override: str
    samples: int
    how: str


@dataclass(frozen=True, kw_only=True)
class LineageNode:
    """Something immutable that a run has made, or began from.

    Attributes:
        name: for example "LATENTS"; what `parents` refers to.
        kind: "table", "checkpoint", "model", "bundle" or "shards".
        place: its URL.
        identity: what it is, as a hash.
        version: of a table; None for what has none.
        parents: names of commits it was made from.
        rows_read: rows that were offered, or None where rows are not counted.
        rows_written: rows that are in it.
        rejected: rows set aside, by reason.

    Raises:
        ValueError: if rows read are not rows written plus rows set aside.
    """

    name: str
    kind: str
    place: str
    identity: str
    version: int | None = None
    parents: tuple[str, ...] = ()
    rows_read: int | None = None
    rows_written: int | None = None
    rejected: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows_read is None:
            return
        accounted = (self.rows_written or 0) + sum(self.rejected.values())
        if accounted != self.rows_read:
            raise ValueError(
                f"{self.name}: {self.rows_read} rows were read, and {accounted} were written or set aside; "
                "every row read must be one or the other"
            )


@dataclass(frozen=True, kw_only=True)
class RejectionExample:
    """One row that was set aside, as its source names it, and what was wrong in words."""

    id: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class RejectionSummary:
    """All rows of a table that were set aside for one reason, a few of them as examples."""

    table: str
    reason: str
    count: int
    examples: tuple[RejectionExample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """A step of the run.

    Attributes:
        step: its name.
        seconds: it took; 0 if it was skipped.
        rows: it made, or None.
        skipped: because its result was committed before.
    """

    step: str
    seconds: float
    rows: int | None = None
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """All that the page shows. A section without content says so, or is left out where nothing was asked.

    Attributes:
        recipe: its name.
        settings_hash: SHA-256 of the resolved settings.
        settings_json: the resolved settings.
        versions: of the software, by name.
        totals: the run in a few numbers, each a value and what it counts.
        scenes: samples of the shards that came in.
        teacher_images: samples of PAIRS.
        fewer_steps: the student beside its teacher.
        comparisons: held-out latents through two decoders.
        charts: the training's curves.
        measurements: the figures.
        anatomies: what the UNet's blocks take, one for each way it was measured.
        phone: what torch and the programs for phones drew.
        artifacts: these programs.
        lineage: every commit, parents before children.
        rejections: what was set aside.
        timings: of the steps, in order.
        finished: when, in words; left out of the page if empty, which then depends on the content alone.
    """

    recipe: str
    settings_hash: str
    settings_json: str
    versions: Mapping[str, str]
    totals: tuple[tuple[str, str], ...] = ()
    scenes: tuple[CaptionedImage, ...] = ()
    teacher_images: tuple[CaptionedImage, ...] = ()
    fewer_steps: StepComparison | None = None
    comparisons: tuple[ImageComparison, ...] = ()
    charts: tuple[Chart, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    anatomies: tuple[LatencyBreakdown, ...] = ()
    phone: tuple[ImageComparison, ...] = ()
    artifacts: tuple[MobileVariant, ...] = ()
    lineage: tuple[LineageNode, ...] = ()
    rejections: tuple[RejectionSummary, ...] = ()
    timings: tuple[StepTiming, ...] = ()
    finished: str = ""


def render_report(content: ReportContent) -> str:
    """The page as text; the same text for the same content.

    Raises:
        ValueError: if a commit names a parent that does not come before it, or a chart has nothing to draw.
    """
    return render_page(
        "report.html.j2",
        content=content,
        factor=DIFFERENCE_FACTOR,
        layers=_layers(content.lineage),
        longest=max([timing.seconds for timing in content.timings], default=0.0) or 1.0,
    )


def mobile_variants_of(manifest: Mapping[str, Any]) -> tuple[MobileVariant, ...]:
    """The variants that the manifest of a mobile bundle describes."""
    return tuple(_mobile_variant(name, told) for name, told in manifest["variants"].items())


def _mobile_variant(name: str, told: Mapping[str, Any]) -> MobileVariant:
    modules, images = told["modules"], told["images"]
    figures = {module: each["parity"] for module, each in modules.items()} | {"images": images}
    return MobileVariant(
        name=name,
        kind=f"{told['runtime']}: {told['weights']}",
        bytes=sum(module["bytes"] for module in modules.values()),
        psnr_db={part: parity["psnr_db"] for part, parity in figures.items()},
        limit_db=images["limit_db"],
        override=images["override"] or "",
        samples=images["samples"],
        how=told["measured"],
    )


def _layers(lineage: tuple[LineageNode, ...]) -> list[list[LineageNode]]:
    """Commits by how many steps they are from the beginning."""
    depth: dict[str, int] = {}
    layers: list[list[LineageNode]] = []
    for commit in lineage:
        unknown = [parent for parent in commit.parents if parent not in depth]
        if unknown:
            raise ValueError(
                f"lineage: {commit.name} names parent {unknown[0]!r}, which does not come before it; "
                f"before it are {', '.join(depth) or 'none'}"
            )
        depth[commit.name] = 1 + max((depth[parent] for parent in commit.parents), default=-1)
        while len(layers) <= depth[commit.name]:
            layers.append([])
        layers[depth[commit.name]].append(commit)
    return layers
