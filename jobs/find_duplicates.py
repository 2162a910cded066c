"""Judge which rows of the shards copy an earlier one, or what a model will be judged by.

Reads the shards as `encode_latents` does, and the lists, folders and shards of `deduplication.evaluation`.
With `deduplication.use` LATENTS refuse what is found.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.inputs import row_filters, shards_url
from jobs.cli.job import Job, run
from jobs.runtime.cluster import reader, runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from pipelines.dedup.decontamination import fingerprint_evaluation
from pipelines.dedup.duplicates import count_verdicts, find_duplicates
from pipelines.dedup.fingerprints import fingerprint_shards
from pipelines.sources.webdataset import list_shards
from pipelines.tables.manifest import total_rejected
from pipelines.tables.table import Snapshot, is_table, open_table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.find_duplicates`."""
    return run("find_duplicates", find, preview=preview, about=__doc__, argv=argv)


def find(job: Job) -> None:
    """Bring FINGERPRINTS up to the shards, and judge as one round what is not judged yet."""
    recipe, settings = job.recipe, job.recipe.deduplication
    table = fingerprint_shards(
        settings.fingerprints,
        latents=recipe.latents,
        shards=list_shards(shards_url(job)),
        source=recipe.source.name,
        url=job.url(settings.fingerprints.table),
        vetoes=row_filters(job),
        origin=job.origin({"shards": shards_url(job)}),
        run=runner(recipe.cluster),
        on_progress=show_progress(job.verb),
    )
    print(f"  FINGERPRINTS version {table.version}: {_counted(table)}")
    evaluation = _evaluation(job)
    against = [open_table(url, kind="fingerprints") for url in settings.against]
    parents = {
        "fingerprints": table.lineage(),
        "evaluation": evaluation and evaluation.lineage(),
        "against": [other.lineage() for other in against],
    }
    judged = find_duplicates(
        settings,
        fingerprints=table,
        url=job.url(settings.table),
        evaluation=evaluation,
        against=against,
        origin=job.origin(parents),
        read=reader(recipe.cluster),
    )
    _report(judged)


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    settings = job.recipe.deduplication
    place = job.url(settings.fingerprints.table)
    held = f"{open_table(place).num_rows} rows are there" if is_table(place) else "a new table"
    if job.recipe.source.url is not None:  # or another step of the run makes them
        list_shards(job.recipe.source.url)
    lines = [f"would read the pictures of {shards_url(job)} into {place} ({held})"]
    lines += [f"would read {what} of the evaluation" for what in settings.evaluation.places]
    lines += [f"would compare with {other}, whose rows come first" for other in settings.against]
    place = job.url(settings.table)
    held = f"{open_table(place).num_rows} rows are judged" if is_table(place) else "a new table"
    return [*lines, f"would judge rows into {place} ({held})"]


def _evaluation(job: Job) -> Snapshot | None:
    settings = job.recipe.deduplication
    if not settings.evaluation.places:
        return None
    table = fingerprint_evaluation(
        settings.fingerprints,
        latents=job.recipe.latents,
        evaluation=settings.evaluation,
        url=job.url(f"{settings.table}-evaluation"),
        origin=job.origin({"evaluation": list(settings.evaluation.places)}),
        run=runner(job.recipe.cluster),
    )
    print(f"  the evaluation: {_counted(table)}")
    return table


def _counted(table: Snapshot) -> str:
    rejected = total_rejected(list(table.manifests().values()))
    return f"{table.num_rows} rows, {_counts(rejected)} rejected"


def _report(table: Snapshot) -> None:
    counts = count_verdicts(table)
    copies = sum(counts.values())
    print(f"  DUPLICATES version {table.version}: {table.num_rows} rows, {_counts(counts)} refused")
    if table.num_rows:
        print(f"  {table.num_rows - copies} of them, {1 - copies / table.num_rows:.1%}, copy nothing")


def _counts(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} ({reasons})" if counts else "none"


if __name__ == "__main__":
    exit_process(main())
