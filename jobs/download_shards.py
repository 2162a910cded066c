"""Download the pictures of URL lists, by img2dataset, into shards that `encode_latents` reads.

Reads the recipe's `download.links`; the recipe's selection and blocklists are applied first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.cli.inputs import row_filters
from jobs.cli.job import Job, run
from jobs.runtime.cluster import runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from pipelines.download.downloads import ShardRanges, download_shards, find_ranges
from pipelines.download.receipts import ShardReceipt, read_receipts
from pipelines.download.settings import DownloadSettings
from pipelines.stages.row_filter import LinkFilter


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.download_shards`."""
    return run("download_shards", download, preview=preview, about=__doc__, argv=argv)


def download(job: Job) -> None:
    """Bring the shards up to the recipe; what has its receipt already is not asked for again."""
    recipe = job.recipe
    place = job.url(recipe.download.place)
    summary = download_shards(
        _with_absolute_python(recipe.download),
        selection=recipe.latents.selection,
        filters=link_filters(job),
        url=place,
        run=runner(recipe.cluster),
        on_progress=show_progress(job.verb),
    )
    print(f"  {summary.rows} rows: {summary.downloaded} pictures in {summary.shards} shards at {place}")
    print(f"  refused: {_counts(summary.refused)}")
    print(f"  failed: {_counts(summary.failed)}")
    if summary.transient:
        more = recipe.download.retry_rounds + 1
        print(f"  {summary.transient} may be had later: --set download.retry_rounds={more} tries them again")


def link_filters(job: Job) -> list[LinkFilter]:
    """The vetoes of the run that can judge a row before its picture is there."""
    return [veto for veto in row_filters(job) if isinstance(veto, LinkFilter)]


def preview(job: Job) -> list[str]:
    """What would be read and downloaded."""
    settings = job.recipe.download
    planned = find_ranges(settings)
    place = job.url(settings.place)
    known = read_receipts(place)
    return [
        f"would download the pictures of {planned.total} rows in {len(planned.lists)} lists to {place}",
        *_remaining(planned, known),
    ]


def _remaining(planned: ShardRanges, known: Mapping[str, ShardReceipt]) -> list[str]:
    parts = list(planned.tasks({}))
    left = [part for part in parts if part.name not in known]
    rows = sum(part.stop - part.start for part in left)
    lines = [
        f"{len(parts)} shards, of which {len(parts) - len(left)} have their receipt; {rows} rows are left"
    ]
    done = sum(receipt.rows for receipt in known.values())
    if done:
        size = sum(receipt.size for receipt in known.values())
        lines.append(f"about {size / done * rows / 1e9:.1f} GB, at {size / done / 1e3:.1f} kB a row so far")
    else:
        lines.append("how many bytes is known when the first shard is there")
    again = sum(
        receipt.transient
        for receipt in known.values()
        if f"{receipt.number:05d}-r{receipt.retry + 1}" not in known
    )
    return [*lines, *([f"{again} rows failed for a cause that may pass"] if again else [])]


def _with_absolute_python(settings: DownloadSettings) -> DownloadSettings:
    """The settings with the interpreter's place absolute, where it is here: workers stand elsewhere."""
    python = Path(settings.fetching.python).absolute()
    if not python.exists():
        return settings
    fetching = settings.fetching.model_copy(update={"python": str(python)})
    return settings.model_copy(update={"fetching": fetching})


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


if __name__ == "__main__":
    exit_process(main())
