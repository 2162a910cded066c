"""What a selection would keep of a sample, as a plain table: to choose bounds by before the work begins."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from jobs.cli.inputs import row_filters
from jobs.cli.job import Job
from pipelines.datasets.preview import (
    CATEGORIES,
    Preview,
    count_link_rows,
    count_shard_rows,
    preview_links,
    preview_shards,
)
from pipelines.sources.layouts import SPELLINGS
from pipelines.sources.links import list_links
from pipelines.sources.webdataset import Shard
from pipelines.stages.crop import SIZE_SETTING, check_size
from pipelines.stages.row_filter import LinkFilter
from pipelines.stages.select import BOUNDS, MEASURES, Measure, silent_bounds
from pipelines.stages.settings import Selection
from snapfusion.models.load import ModelError, load_sizes

WIDTH: Final = 100
_QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
_WORDS_SHOWN: Final = 5


def shard_preview_lines(job: Job, shards: Sequence[Shard]) -> list[str]:
    """The preview of shards, at most 100 columns wide."""
    recipe = job.recipe
    looked = preview_shards(
        shards,
        rows=recipe.source.sample_rows,
        source=recipe.source.name,
        reading=recipe.latents.shards,
        selection=recipe.latents.selection,
        pictures=recipe.latents.images,
        vetoes=row_filters(job),
    )
    known, unknown = count_shard_rows(shards)
    whole = None if unknown else known
    return [
        *_table(looked, recipe.latents.selection, whole=whole, places=len(shards), what="shards"),
        *_outlook(looked, whole=whole, without=unknown),
        *_size(looked, job, whole=whole),
    ]


def link_preview_lines(job: Job) -> list[str]:
    """The preview of the URL lists of `download.links`, at most 100 columns wide."""
    recipe = job.recipe
    lists = list_links(recipe.download.links or "")
    looked = preview_links(
        lists,
        rows=recipe.source.sample_rows,
        columns=recipe.download.columns,
        selection=recipe.latents.selection,
        vetoes=[veto for veto in row_filters(job) if isinstance(veto, LinkFilter)],
    )
    whole = count_link_rows(lists, recipe.download.columns)
    return [
        *_table(looked, recipe.latents.selection, whole=whole, places=len(lists), what="lists"),
        *_outlook(looked, whole=whole, without=0),
    ]


def unused_bound_lines(selection: Selection, columns: Iterable[str]) -> list[str]:
    """What is said of each bound that is set and finds no column; none of them refuses a row."""
    meanings = {bound.setting: bound.looks_at for bound in BOUNDS}
    lines = []
    for setting in silent_bounds(selection, columns):
        names = " and none ".join(", ".join(SPELLINGS[meaning]) for meaning in meanings[setting])
        lines.append(f"latents.selection.{setting} refuses nothing here: there is no column {names}")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]


def _table(
    looked: Preview, selection: Selection, *, whole: int | None, places: int, what: str
) -> Iterator[str]:
    of = "" if whole is None else f" of {whole:,}"
    yield f"looked at {looked.rows:,} rows{of}, in {looked.places} of {places:,} {what}"
    yield f"layout: {looked.layout}"
    yield ""
    yield from _reasons(looked)
    yield ""
    yield from _measures(looked)
    yield from _classes(looked)
    silent = unused_bound_lines(selection, looked.columns) if looked.rows else []
    if silent:
        yield ""
        yield from silent


def _reasons(looked: Preview) -> Iterator[str]:
    yield f"{'':<18}{'rows':>7}{'share':>8}  for example"
    yield f"{'kept':<18}{looked.kept:>7}{looked.share:>8.1%}".rstrip()
    for reason, refused in sorted(looked.refused.items(), key=lambda item: (-item[1].rows, item[0])):
        share = refused.rows / looked.rows
        yield _cut(f"{reason:<18}{refused.rows:>7}{share:>8.1%}  {refused.example}").rstrip()


def _measures(looked: Preview) -> Iterator[str]:
    head = "".join(f"{_percent(quantile):>8}" for quantile in _QUANTILES)
    yield f"{'':<24}{'rows':>7}{head}  bound by"
    for measure in MEASURES:
        values = looked.measures[measure.what]
        if values:
            numbers = "".join(f"{_short(value):>8}" for value in np.quantile(values, _QUANTILES))
            yield f"{measure.what:<24}{len(values):>7}{numbers}  {_bounding(measure)}"


def _bounding(measure: Measure) -> str:
    """The settings that bound it; of two that differ in `min` and `max` the rest is said once."""
    settings = [bound.setting for bound in BOUNDS if bound.measure is measure]
    return " ".join([*(setting[:4] for setting in settings[:-1]), settings[-1]])


def _classes(looked: Preview) -> Iterator[str]:
    for meaning in CATEGORIES:
        words = looked.classes[meaning]
        if words:
            shown = ", ".join(f"{word} {rows}" for word, rows in words.most_common(_WORDS_SHOWN))
            more = f", {len(words) - _WORDS_SHOWN} more" if len(words) > _WORDS_SHOWN else ""
            settings = [bound.setting for bound in BOUNDS if meaning in bound.looks_at]
            yield _cut(f"{meaning:<24}{words.total():>7}  {shown}{more}; bound by {', '.join(settings)}")


def _outlook(looked: Preview, *, whole: int | None, without: int) -> Iterator[str]:
    yield ""
    if whole is None:
        yield f"how many rows there are is not known: {without:,} shards have no sidecar"
    else:
        yield f"of {whole:,} rows about {_rounded(looked.share * whole):,} would be kept"


def _size(looked: Preview, job: Job, *, whole: int | None) -> Iterator[str]:
    if whole is None or not looked.kept:
        return
    try:
        model = load_sizes(job.recipe.model)
    except ModelError as error:
        yield _cut(f"their size is not known: {error}")
        return
    side = job.recipe.latents.images.size or model.side
    check_size(side, step=model.granularity, option=SIZE_SETTING)
    latent = model.channels * (side // model.cell) ** 2 * np.dtype(np.float16).itemsize
    row = latent + looked.text_bytes / looked.kept
    at_most = " at most" if job.recipe.latents.images.buckets else ""
    total = _bytes(row * looked.share * whole)
    yield f"in LATENTS{at_most} about {total}: {_bytes(row)} a row, pictures of {side} px"


def _percent(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{quantile:.0%}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rounded(rows: float) -> int:
    """To three digits: a sample says no more."""
    return int(float(f"{rows:.3g}"))


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
