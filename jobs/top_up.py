"""Append to LATENTS, PAIRS or TARGETS within a quota, as a scheduled job.

Give the job: encode_latents, generate_pairs or compute_targets. What it has not done are shards that came,
captions, or draws, as its own settings ask for. It has the table's turn while it works: if that is another's,
because the last run is still at work, this one says so and ends well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs import compute_targets, encode_latents, generate_pairs
from jobs.cli.job import Body, Job, Preview, run
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import format_duration
from pipelines.tables.leases import TableBusy, append_lease
from pipelines.tables.table import is_table, open_table
from snapfusion.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class _AppendJob:
    """A job that appends: the setting that it reads, what it does, and what it would."""

    setting: str
    body: Body
    preview: Preview


STEPS = {
    "encode_latents": _AppendJob(
        setting="latents", body=encode_latents.encode, preview=encode_latents.preview
    ),
    "generate_pairs": _AppendJob(
        setting="pairs", body=generate_pairs.generate, preview=generate_pairs.preview
    ),
    "compute_targets": _AppendJob(
        setting="targets", body=compute_targets.compute, preview=compute_targets.preview
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.top_up`."""
    return run("top_up", top_up, preview=preview, about=__doc__, argv=argv, target="STEP")


def top_up(job: Job) -> None:
    """Take the turn, and run the step within the quota."""
    step, table = _step(job), table_of(job)
    before = open_table(table).num_rows if is_table(table) else 0
    try:
        with append_lease(table, purpose=f"top_up of {job.target}"):
            step.body(within_quota(job))
    except TableBusy as error:
        print(f"  {error}; nothing was done")
        return
    print(f"  {open_table(table).num_rows - before} rows more")


def within_quota(job: Job) -> Job:
    """The same job, with its step bounded by the recipe's quota."""
    setting = _step(job).setting
    settings = getattr(job.recipe, setting)
    bounded = settings.model_copy(update={"bounds": job.recipe.quota.bound(settings.bounds)})
    return replace(job, verb=job.target, recipe=job.recipe.model_copy(update={setting: bounded}))


def table_of(job: Job) -> str:
    """The table that the step appends to."""
    setting = _step(job).setting
    return job.url(job.recipe.source.table if setting == "latents" else setting)


def preview(job: Job) -> list[str]:
    """What the step would do, and how far."""
    quota = job.recipe.quota
    bounds = [f"{quota.rows} rows"] if quota.rows is not None else []
    bounds += [format_duration(quota.seconds)] if quota.seconds is not None else []
    return [*_step(job).preview(job), f"in this run at most {' or '.join(bounds) or 'all of it'}"]


def _step(job: Job) -> _AppendJob:
    if job.target not in STEPS:
        raise SettingsError(f"STEP {job.target or 'is missing'}: {', '.join(STEPS)} are accepted")
    return STEPS[job.target]


if __name__ == "__main__":
    exit_process(main())
