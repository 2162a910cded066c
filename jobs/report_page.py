"""The report: one static HTML page with its pictures inside, which asks the network for nothing.

Captions, file names and reasons come from other people's data. Whatever the page shows of them is stripped of
control characters, shortened, and escaped by the template.
"""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from jobs.chart import Chart, chart_svg
from pipelines.schemas import to_png
from snapfusion.export.parity import psnr

DIFFERENCE_FACTOR = 8
"""How much difference pictures are amplified."""

_LONGEST_TEXT = 400
_LARGEST_SIDE = 256
_SMALL_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Picture:
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
class Comparison:
    """One held-out latent through three decoders; each image uint8 [H,W,3].

    Attributes:
        caption: of the latent.
        teacher: by the full decoder.
        half: by the half-width decoder in torch.
        compiled: by the half-width decoder's ExecuTorch program; None if it was not compiled.
    """

    caption: str
    teacher: np.ndarray
    half: np.ndarray
    compiled: np.ndarray | None = None

    @cached_property
    def difference(self) -> np.ndarray:
        """|half - teacher|, `DIFFERENCE_FACTOR` times, uint8 [H,W,3]."""
        distance = np.abs(self.half.astype(np.int32) - self.teacher.astype(np.int32))
        return np.clip(distance * DIFFERENCE_FACTOR, 0, 255).astype(np.uint8)

    @property
    def half_psnr_db(self) -> float:
        """Of the half-width decoder to the teacher, on these 8-bit images, peak 255."""
        return psnr(self.half, self.teacher, peak=255.0)

    @property
    def compiled_psnr_db(self) -> float | None:
        """Of the compiled decoder to the teacher, likewise."""
        return None if self.compiled is None else psnr(self.compiled, self.teacher, peak=255.0)


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
class Artifact:
    """A program for phones.

    Attributes:
        name: of the file.
        kind: its format and arithmetic.
        bytes: its size.
        psnr_db: to torch; None if every bit agrees.
        limit_db: below which it would not be here.
        samples: on how many held-out latents.
        how: by what means it was compared.
    """

    name: str
    kind: str
    bytes: int
    psnr_db: float | None
    limit_db: float
    samples: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Commit:
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
class RejectedRow:
    """One row that was set aside, as its source names it, and what was wrong in words."""

    id: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """All rows of a table that were set aside for one reason, a few of them as examples."""

    table: str
    reason: str
    count: int
    examples: tuple[RejectedRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timing:
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
        comparisons: held-out latents through three decoders.
        charts: the training's curves.
        measurements: the figures.
        artifacts: the programs for phones.
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
    scenes: tuple[Picture, ...] = ()
    teacher_images: tuple[Picture, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    charts: tuple[Chart, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    lineage: tuple[Commit, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    timings: tuple[Timing, ...] = ()
    finished: str = ""


def render_report(content: ReportContent) -> str:
    """The page as text; the same text for the same content.

    Raises:
        ValueError: if a commit names a parent that does not come before it, or a chart has nothing to draw.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _shown(value) if isinstance(value, str) else value,
    )
    environment.filters |= {
        "picture": _picture,
        "chart": lambda chart: Markup(chart_svg(chart)),
        "count": lambda number: f"{number:,}",
        "decibels": _decibels,
        "duration": _duration,
        "figure": lambda number: f"{number:,.4g}" if abs(number) < 10_000 else f"{number:,.0f}",
        "rate": lambda number: f"{number:.3g}" if number < 1000 else f"{number:,.0f}",
        "size": _size,
        "whole": lambda text: Markup(Markup.escape(text)),
    }
    return environment.get_template("report.html.j2").render(
        content=content,
        factor=DIFFERENCE_FACTOR,
        layers=_layers(content.lineage),
        longest=max([timing.seconds for timing in content.timings], default=0.0) or 1.0,
    )


def artifacts_of(manifest: Mapping[str, Any]) -> tuple[Artifact, ...]:
    """The programs that the manifest of a mobile bundle describes."""
    return tuple(
        Artifact(
            name=artifact["file"],
            kind=artifact["backend"],
            bytes=artifact["bytes"],
            psnr_db=artifact["parity"]["psnr_db"],
            limit_db=artifact["parity"]["limit_db"],
            samples=artifact["parity"]["samples"],
            how=artifact["parity_by"],
        )
        for module in manifest["modules"].values()
        for artifact in module["artifacts"].values()
    )


def _layers(lineage: tuple[Commit, ...]) -> list[list[Commit]]:
    """Commits by how many steps they are from the beginning."""
    depth: dict[str, int] = {}
    layers: list[list[Commit]] = []
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


def _shown(text: str) -> str:
    """Text of others as the page can bear it: without control or direction characters, and not endless."""
    if isinstance(text, Markup):
        return text
    head = text[: _LONGEST_TEXT + 1]
    clean = "".join(letter if unicodedata.category(letter)[0] != "C" else " " for letter in head)
    return clean if len(text) <= _LONGEST_TEXT else f"{clean[:_LONGEST_TEXT]}…"


def _picture(image: np.ndarray, label: str) -> Markup:
    """An `<img>` with the pixels inside; larger ones are shrunk, small ones are shown as squares."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is {image.dtype} {image.shape}; uint8 [H,W,3] is accepted")
    if max(image.shape[:2]) > _LARGEST_SIDE:
        shrunk = Image.fromarray(image)
        shrunk.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        image = np.asarray(shrunk)
    height, width = image.shape[:2]
    kind = "pixels" if max(height, width) <= _SMALL_SIDE else "photo"
    data = base64.b64encode(to_png(image)).decode()
    return Markup('<img class="{}" width="{}" height="{}" alt="{}" src="data:image/png;base64,{}">').format(
        kind, width, height, _shown(label), data
    )


def _decibels(figure: float | None) -> str:
    return "every bit agrees" if figure is None or math.isinf(figure) else f"{figure:.1f} dB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
