"""Download the pictures of URL lists, by img2dataset, into shards that `encode_latents` reads.

Reads the recipe's `download.links`; the recipe's selection and blocklists are applied first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.cli import Job, run
from jobs.cluster import runner
from jobs.exits import leave
from jobs.progress import show
from jobs.vetoes import vetoes_of
from pipelines.downloads import Downloads, Plan, download_shards, plan
from pipelines.receipts import Receipt, receipts
from pipelines.stages.veto import LinkVeto


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.download_shards`."""
    return run("download_shards", download, preview=preview, about=__doc__, argv=argv)


def download(job: Job) -> None:
    """Bring the shards up to the recipe; what has its receipt already is not asked for again."""
    recipe = job.recipe
    place = job.place(recipe.download.place)
    summary = download_shards(
        _here(recipe.download),
        selection=recipe.latents.selection,
        vetoes=link_vetoes(job),
        url=place,
        run=runner(recipe.cluster),
        on_progress=show(job.verb),
    )
    print(f"  {summary.rows} rows: {summary.downloaded} pictures in {summary.shards} shards at {place}")
    print(f"  refused: {_said(summary.refused)}")
    print(f"  failed: {_said(summary.failed)}")
    if summary.transient:
        more = recipe.download.retry_rounds + 1
        print(f"  {summary.transient} may be had later: --set download.retry_rounds={more} tries them again")


def link_vetoes(job: Job) -> list[LinkVeto]:
    """The vetoes of the run that can judge a row before its picture is there."""
    return [veto for veto in vetoes_of(job) if isinstance(veto, LinkVeto)]


def preview(job: Job) -> list[str]:
    """What would be read and downloaded."""
    settings = job.recipe.download
    planned = plan(settings)
    place = job.place(settings.place)
    known = receipts(place)
    return [
        f"would download the pictures of {planned.total} rows in {len(planned.lists)} lists to {place}",
        *_left(planned, known),
    ]


def _left(planned: Plan, known: Mapping[str, Receipt]) -> list[str]:
    parts = list(planned.parts({}))
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


def _here(settings: Downloads) -> Downloads:
    """The settings with the interpreter's place absolute, where it is here: workers stand elsewhere."""
    python = Path(settings.fetching.python).absolute()
    if not python.exists():
        return settings
    fetching = settings.fetching.model_copy(update={"python": str(python)})
    return settings.model_copy(update={"fetching": fetching})


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


if __name__ == "__main__":
    leave(main())
