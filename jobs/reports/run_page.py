"""Content and page of the report of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jobs.reports.charts import Chart
from jobs.reports.latency_breakdown import LatencyBreakdown
from jobs.reports.page import render_page
from jobs.reports.part_cache import Pixels
from snapfusion.export.parity import psnr
from snapfusion.mini.captions import caption_grammar

DIFFERENCE_FACTOR = 8
"""Amplification of difference images."""


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """An image with its caption.

    Attributes:
        image: uint8 [H,W,3].
        caption: of the image.
        note: a second, smaller line, such as the oracle's score of it.
    """

    image: Pixels
    caption: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparedImage:
    """An image compared with a reference, both uint8 [H,W,3].

    Attributes:
        name: of the model or program that made it.
        image: its output.
        reference: the expected output.
    """

    name: str
    image: Pixels
    reference: Pixels

    @cached_property
    def difference(self) -> np.ndarray:
        """|image - reference| times `DIFFERENCE_FACTOR`, uint8 [H,W,3]."""
        # Differences of uint8 would wrap around below zero.
        distance = np.abs(self.image.astype(np.int32) - self.reference.astype(np.int32))
        return np.clip(distance * DIFFERENCE_FACTOR, 0, 255).astype(np.uint8)

    @property
    def psnr_db(self) -> float:
        """PSNR relative to the reference, of these 8-bit images, peak 255."""
        return psnr(self.image, self.reference, peak=255.0)


@dataclass(frozen=True, kw_only=True)
class ImageComparison:
    """One caption by a reference and by others.

    Attributes:
        caption: the text.
        name: of the reference.
        reference: uint8 [H,W,3].
        images: of the others, by name.
    """

    caption: str
    name: str
    reference: Pixels
    images: Mapping[str, Pixels]

    @cached_property
    def compared(self) -> list[ComparedImage]:
        """The others beside the reference."""
        return [
            ComparedImage(name=name, image=image, reference=self.reference)
            for name, image in self.images.items()
        ]


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """Metrics of one model's images over all captions.

    Attributes:
        name: "teacher", "undistilled" or "student".
        steps: of its sampler.
        attributes_right: share of the captions' attributes that the oracle finds.
        all_attributes_right: share of the images in which it finds every attribute.
        clip: mean score of image and caption.
        distance: root mean square distance of pixels to the teacher's, in gray levels of 255.
    """

    name: str
    steps: int
    attributes_right: float
    all_attributes_right: float
    clip: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One caption and noise; an image by each model, which its own caption names."""

    caption: str
    images: tuple[CaptionedImage, ...]


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """A student beside its teacher and beside its own initial weights.

    Attributes:
        guidance: w of all images.
        num_captions: captions behind the metrics.
        scorer: network behind the CLIP scores.
        models: teacher, undistilled, student.
        rows: some of the captions.
    """

    guidance: float
    num_captions: int
    scorer: str
    models: tuple[ModelMetrics, ...]
    rows: tuple[SampleRow, ...]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number with what is needed to trust it.

    Attributes:
        name: of the quantity.
        value: the number.
        unit: "dB", "ms"; empty for a plain number.
        count: number of things that it is the mean or total of.
        counted: their name, such as "held-out pairs".
        seed: of their choice; None if nothing is random.
        note: on the measurement, or the value to compare with.
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
    """One variant of the programs for phones.

    Attributes:
        name: of the variant.
        kind: its runtime and the precision of its weights.
        bytes: size of all its modules.
        psnr_db: of each module, by name, and of the "images"; None if every bit agrees.
        limit_db: least PSNR of the images for a variant to be published.
        override: why it was published below the limit; empty if it is not below.
        samples: number of captions.
        method: of comparing the outputs.
    """

    name: str
    kind: str
    bytes: int
    psnr_db: Mapping[str, float | None]
    limit_db: float
    override: str
    samples: int
    method: str


@dataclass(frozen=True, kw_only=True)
class LineageNode:
    """An immutable commit that a run made or was started from.

    Attributes:
        name: for example "LATENTS"; what `parents` refers to.
        kind: "table", "checkpoint", "model", "bundle" or "shards".
        url: of the commit.
        identity: its hash.
        version: of a table; None for other kinds.
        parents: names of the commits that it was made from.
        rows_read: rows of its sources; None if rows are not counted.
        rows_written: rows in it.
        rejected: rejected rows, by reason.

    Raises:
        ValueError: if rows read are not rows written plus rows rejected.
    """

    name: str
    kind: str
    url: str
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
                f"{self.name}: {self.rows_read} rows were read, but {accounted} were written or rejected"
            )


@dataclass(frozen=True, kw_only=True)
class RejectionExample:
    """One rejected row: its id, and the detail of the rejection."""

    id: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class RejectionSummary:
    """All rows of a table that were rejected for one reason, with a few examples."""

    table: str
    reason: str
    count: int
    examples: tuple[RejectionExample, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Duration of one step of the run.

    Attributes:
        step: its name.
        seconds: of wall time; 0 if it was skipped.
        rows: that it made, or None.
        skipped: whether its result was committed before.
        network_busy: share of the time between the first and last units of its workers in which their
            networks computed; None if it is not known.
    """

    step: str
    seconds: float
    rows: int | None = None
    skipped: bool = False
    network_busy: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that the page shows; a section without content says so.

    Attributes:
        recipe: its name.
        settings_hash: SHA-256 of the resolved settings.
        settings_json: the resolved settings.
        versions: of the software, by name.
        totals: the run in a few numbers, each a value and what it counts.
        scenes: samples of the input shards.
        teacher_images: samples of PAIRS.
        step_comparison: the student beside its teacher.
        decoder_comparisons: held-out latents through both decoders.
        charts: loss curves of the trainings.
        measurements: all measured numbers.
        latencies: of the UNet's blocks, one for each way of measuring; without any the section is left out.
        mobile_comparisons: images by torch and by the programs for phones.
        mobile_variants: these programs.
        lineage: every commit, parents before children.
        rejections: rejected rows.
        timings: of the steps, in order.
        unknown_captions: those that the miniature, if it is the run's model, does not know.
        other_weights: sentences on published weights that are not those that were measured.
        usage: commands that generate images with the run's models; without any the section is left out.
        page: of the bundle, relative to the report; empty if it has none.
    """

    recipe: str
    settings_hash: str
    settings_json: str
    versions: Mapping[str, str]
    totals: tuple[tuple[str, str], ...] = ()
    scenes: tuple[CaptionedImage, ...] = ()
    teacher_images: tuple[CaptionedImage, ...] = ()
    step_comparison: StepComparison | None = None
    decoder_comparisons: tuple[ImageComparison, ...] = ()
    charts: tuple[Chart, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    latencies: tuple[LatencyBreakdown, ...] = ()
    mobile_comparisons: tuple[ImageComparison, ...] = ()
    mobile_variants: tuple[MobileVariant, ...] = ()
    lineage: tuple[LineageNode, ...] = ()
    rejections: tuple[RejectionSummary, ...] = ()
    timings: tuple[StepTiming, ...] = ()
    unknown_captions: frozenset[str] = frozenset()
    other_weights: tuple[str, ...] = ()
    usage: tuple[str, ...] = ()
    page: str = ""


def render_report(content: ReportContent) -> str:
    """The page as text; the same content gives the same text.

    Raises:
        ValueError: if a commit names a parent that does not come before it, or a chart has no series.
    """
    return render_page(
        "report.html.j2",
        content=content,
        factor=DIFFERENCE_FACTOR,
        grammar=caption_grammar(),
        layers=_layers(content.lineage),
        longest=max([timing.seconds for timing in content.timings], default=0.0) or 1.0,
    )


def mobile_variants_of(manifest: Mapping[str, Any]) -> tuple[MobileVariant, ...]:
    """The variants that the manifest of a mobile bundle describes."""
    return tuple(
        MobileVariant(
            name=name,
            kind=f"{record['runtime']}: {record['weights']}",
            bytes=sum(module["bytes"] for module in record["modules"].values()),
            psnr_db={module: each["parity"]["psnr_db"] for module, each in record["modules"].items()}
            | {"images": record["images"]["psnr_db"]},
            limit_db=record["images"]["limit_db"],
            override=record["images"]["override"] or "",
            samples=record["images"]["samples"],
            method=record["measured"],
        )
        for name, record in manifest["variants"].items()
    )


def _layers(lineage: tuple[LineageNode, ...]) -> list[list[LineageNode]]:
    """The commits by depth: the length of the longest path from a commit without parents."""
    depth: dict[str, int] = {}
    for node in lineage:
        unknown = [parent for parent in node.parents if parent not in depth]
        if unknown:
            raise ValueError(
                f"lineage: {node.name} names parent {unknown[0]!r}, which does not come before it; "
                f"before it are {', '.join(depth) or 'none'}"
            )
        depth[node.name] = 1 + max((depth[parent] for parent in node.parents), default=-1)
    return [[node for node in lineage if depth[node.name] == level] for level in sorted({*depth.values()})]
