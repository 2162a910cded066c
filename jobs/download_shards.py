"""Download the images of URL lists with img2dataset into shards that `encode_latents` reads.

Reads the recipe's `download.links`; the recipe's selection and blocklists are applied before the download.
"""

from collections.abc import Mapping
from pathlib import Path

from jobs.cli.inputs import link_filters
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_progress
from pipelines.download.receipts import read_receipts
from pipelines.download.settings import DownloadSettings


def download(job: Job) -> None:
    """Bring the shards up to date with the recipe; rows with a receipt are not requested again."""
    from pipelines.download.downloads import download_shards

    recipe = job.recipe
    url = job.url(recipe.download.folder)
    summary = download_shards(
        _with_absolute_python(recipe.download),
        selection=recipe.latents.selection,
        filters=link_filters(job),
        url=url,
        run=runner(job, "download"),
        on_progress=show_progress(job.verb),
    )
    logger.info(f"  {summary.rows} rows: {summary.downloaded} images in {summary.shards} shards at {url}")
    logger.info(f"  rejected: {_counts(summary.refused)}")
    logger.info(f"  failed: {_counts(summary.failed)}")
    if summary.transient:
        rounds = recipe.download.retry_rounds + 1
        logger.info(
            f"  {summary.transient} failures may be transient: --set download.retry_rounds={rounds} retries"
        )


def preview(job: Job) -> list[str]:
    """Describe the lists and the remaining downloads."""
    from pipelines.download.downloads import find_ranges

    settings = job.recipe.download
    ranges, url = find_ranges(settings), job.url(settings.folder)
    known, parts = read_receipts(url), list(ranges.tasks({}))
    left = [part for part in parts if part.name not in known]
    rows = sum(part.stop - part.start for part in left)
    done = sum(receipt.rows for receipt in known.values())
    bytes_left = "the number of bytes is known after the first shard"
    if done:
        size = sum(receipt.size for receipt in known.values()) / done
        bytes_left = f"about {size * rows / 1e9:.1f} GB, at {size / 1e3:.1f} kB per row so far"
    # A receipt of the next retry round has taken over what failed in this one.
    transient = sum(
        receipt.transient
        for receipt in known.values()
        if f"{receipt.number:05d}-r{receipt.retry + 1}" not in known
    )
    return [
        f"would download the images of {ranges.total} rows in {len(ranges.lists)} lists to {url}",
        f"{len(parts)} shards, {len(parts) - len(left)} of them with a receipt; {rows} rows are left",
        bytes_left,
        *([f"{transient} rows failed for a transient cause"] if transient else []),
    ]


def _with_absolute_python(settings: DownloadSettings) -> DownloadSettings:
    """The settings with an absolute path of the interpreter, if it exists: workers run in another folder."""
    python = Path(settings.fetching.python).absolute()
    if not python.exists():
        return settings
    fetching = settings.fetching.model_copy(update={"python": str(python)})
    return settings.model_copy(update={"fetching": fetching})


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


main = recipe_verb("download_shards", download, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
