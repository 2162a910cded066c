"""Formats what a selection would keep of a sample of shards or URL lists, as a plain table of 100 columns."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from jobs.cli.inputs import link_filters, row_filters
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
from pipelines.stages.select import BOUNDS, MEASURES, silent_bounds
from pipelines.stages.settings import Selection
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load_sizes

WIDTH: Final = 100
_QUANTILES: Final = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
_NUM_WORDS: Final = 5


def shard_preview_lines(job: Job, shards: Sequence[Shard]) -> list[str]:
    """The preview of shards."""
    recipe = job.recipe
    preview = preview_shards(
        shards,
        rows=recipe.source.sample_rows,
        source=recipe.source.name,
        reading=recipe.latents.shards,
        selection=recipe.latents.selection,
        images=recipe.latents.images,
        filters=row_filters(job),
        decode_seconds=recipe.latents.decode_seconds,
    )
    counted, uncounted = count_shard_rows(shards)
    total = None if uncounted else counted
    lines = [*_table(preview, recipe.latents.selection, total=total, sources=f"{len(shards):,} shards"), ""]
    if total is None:
        return [*lines, f"the number of rows is unknown: {uncounted:,} shards have no sidecar"]
    return [*lines, _kept_line(preview, total), *_size(preview, job, total=total)]


def link_preview_lines(job: Job) -> list[str]:
    """The preview of the URL lists of `download.links`."""
    recipe = job.recipe
    lists = list_links(recipe.download.links or "")
    preview = preview_links(
        lists,
        rows=recipe.source.sample_rows,
        columns=recipe.download.columns,
        selection=recipe.latents.selection,
        filters=link_filters(job),
    )
    total = count_link_rows(lists, recipe.download.columns)
    table = _table(preview, recipe.latents.selection, total=total, sources=f"{len(lists):,} lists")
    return [*table, "", _kept_line(preview, total)]


def unused_bound_lines(selection: Selection, columns: Iterable[str]) -> list[str]:
    """A line for each bound that is set but has no column to check, so that it rejects nothing."""
    meanings = {bound.setting: bound.columns for bound in BOUNDS}
    lines = []
    for setting in silent_bounds(selection, columns):
        names = " and no ".join(", ".join(SPELLINGS[meaning]) for meaning in meanings[setting])
        line = f"latents.selection.{setting} rejects nothing here: there is no column {names}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ")
    return lines


def _table(preview: Preview, selection: Selection, *, total: int | None, sources: str) -> Iterator[str]:
    of_total = "" if total is None else f" of {total:,}"
    yield f"sampled {preview.rows:,} rows{of_total}, from {preview.num_sources} of {sources}"
    yield f"layout: {preview.layout}"
    yield ""
    yield from _reasons(preview)
    yield ""
    yield from _measures(preview)
    yield from _categories(preview)
    if preview.rows and (unused := unused_bound_lines(selection, preview.columns)):
        yield from ("", *unused)


def _reasons(preview: Preview) -> Iterator[str]:
    yield f"{'':<18}{'rows':>7}{'share':>8}  for example"
    yield f"{'kept':<18}{preview.accepted:>7}{preview.accepted_share:>8.1%}".rstrip()
    for reason, rejected in sorted(preview.rejected.items(), key=lambda item: (-item[1].rows, item[0])):
        share = rejected.rows / preview.rows
        yield _cut(f"{reason:<18}{rejected.rows:>7}{share:>8.1%}  {rejected.example}").rstrip()


def _measures(preview: Preview) -> Iterator[str]:
    yield f"{'':<24}{'rows':>7}{''.join(f'{name:>8}' for name in _QUANTILES)}  bound by"
    for measure in MEASURES:
        values = preview.measures[measure.name]
        if values:
            quantiles = np.quantile(values, list(_QUANTILES.values()))
            numbers = "".join(f"{_short(value):>8}" for value in quantiles)
            settings = [bound.setting for bound in BOUNDS if bound.measure is measure]
            # "min max_side": settings of one measure differ in their first four letters alone.
            names = " ".join([*(setting[:4] for setting in settings[:-1]), settings[-1]])
            yield f"{measure.name:<24}{len(values):>7}{numbers}  {names}"


def _categories(preview: Preview) -> Iterator[str]:
    for meaning in CATEGORIES:
        words = preview.categories[meaning]
        if words:
            common = ", ".join(f"{word} {rows}" for word, rows in words.most_common(_NUM_WORDS))
            more = f", {len(words) - _NUM_WORDS} more" if len(words) > _NUM_WORDS else ""
            settings = ", ".join(bound.setting for bound in BOUNDS if meaning in bound.columns)
            yield _cut(f"{meaning:<24}{words.total():>7}  {common}{more}; bound by {settings}")


def _kept_line(preview: Preview, total: int) -> str:
    kept = int(float(f"{preview.accepted_share * total:.3g}"))  # a sample gives no more than three digits
    return f"of {total:,} rows about {kept:,} would be kept"


def _size(preview: Preview, job: Job, *, total: int) -> Iterator[str]:
    """The size of LATENTS, extrapolated from the sample."""
    if not preview.accepted:
        return
    try:
        model = load_sizes(job.recipe.model)
    except ModelError as error:
        yield _cut(f"their size is unknown: {error}")
        return
    images = job.recipe.latents.images
    side = images.size or model.side
    check_size(side, step=model.granularity, option=SIZE_SETTING)
    latent = model.channels * (side // model.cell) ** 2 * np.dtype(np.float16).itemsize
    row = latent + preview.text_bytes / preview.accepted
    at_most = " at most" if images.buckets else ""
    size = _bytes(row * preview.accepted_share * total)
    yield f"in LATENTS{at_most} about {size}: {_bytes(row)} per row, images of {side} px"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
