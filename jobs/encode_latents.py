"""Stream shards through the VAE encoder into the table LATENTS.

Reads the recipe's `source.url`, or the shards that `render_scenes` left in the run.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import Job, run
from jobs.cluster import runner
from jobs.exits import leave
from jobs.progress import show
from jobs.vetoes import vetoes_of
from pipelines.account import total_rejected
from pipelines.latents import encode_latents
from pipelines.sources.webdataset import list_shards
from pipelines.tables import accounts, is_table, open_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.encode_latents`."""
    return run("encode_latents", encode, preview=preview, about=__doc__, argv=argv)


def encode(job: Job) -> None:
    """Bring LATENTS up to the recipe; what is committed already is not made again."""
    recipe = job.recipe
    shards = list_shards(shards_url(job))
    table = encode_latents(
        recipe.latents,
        model=recipe.model,
        shards=shards,
        source=recipe.source.name,
        url=job.place(recipe.source.table),
        vetoes=vetoes_of(job),
        origin=job.origin({"shards": shards_url(job), "model": recipe.model}),
        run=runner(recipe.cluster),
        on_progress=show(job.verb),
    )
    rejected = total_rejected(list(accounts(table.url).values()))
    counted = f"{table.num_rows} rows in {len(table.units)} units, {_said(rejected)}"
    print(f"  LATENTS version {table.version}: {counted}")


def shards_url(job: Job) -> str:
    """The recipe's shards, or else those rendered into the run."""
    return job.recipe.source.url or job.place("shards")


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    place = job.place(job.recipe.source.table)
    held = f"{open_table(place).num_rows} rows are committed" if is_table(place) else "a new table"
    return [f"would encode {shards_url(job)} into {place} ({held})"]


def _said(rejected: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return f"{sum(rejected.values())} rejected ({reasons})" if rejected else "none rejected"


if __name__ == "__main__":
    leave(main())
