"""Append pending work to LATENTS, PAIRS or TARGETS within a quota, for scheduled runs.

Give the job: encode_latents, generate_pairs or compute_targets. Its pending work is new shards, captions or
draws, according to its own settings. A lease on appending to the table is held meanwhile: if another run
holds it, nothing is done and the exit code is 0.
"""

from dataclasses import replace

from jobs import compute_targets, encode_latents, generate_pairs
from jobs.cli.job import Job
from jobs.cli.verb import Body, Preview, recipe_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import format_duration
from pipelines.tables.leases import TableBusy, append_lease
from snapfusion.settings import SettingsError

STEPS: dict[str, tuple[str, Body, Preview]] = {
    "encode_latents": ("latents", encode_latents.encode, encode_latents.preview),
    "generate_pairs": ("pairs", generate_pairs.generate, generate_pairs.preview),
    "compute_targets": ("targets", compute_targets.compute, compute_targets.preview),
}
"""The jobs that append: the recipe's setting that each reads, its body and its preview."""


def top_up(job: Job) -> None:
    """Carry out the step within the quota, holding the lease on its table."""
    from pipelines.tables.table import is_table, open_table

    setting, body, _ = _step(job)
    url = job.url(job.recipe.source.table if setting == "latents" else setting)
    before = open_table(url).num_rows if is_table(url) else 0
    try:
        with append_lease(url, purpose=f"top_up of {job.target}"):
            body(_within_quota(job, setting))
    except TableBusy as error:
        logger.info(f"  {error}; nothing was done")
        return
    logger.info(f"  {open_table(url).num_rows - before} rows more")


def _within_quota(job: Job, setting: str) -> Job:
    """The step's own job, with the bounds of its table set to the recipe's quota."""
    settings = getattr(job.recipe, setting)
    bounded = settings.model_copy(update={"bounds": job.recipe.quota.bound(settings.bounds)})
    return replace(job, verb=job.target, recipe=job.recipe.model_copy(update={setting: bounded}))


def preview(job: Job) -> list[str]:
    """The preview of the step, and its quota."""
    quota, (_, _, step_preview) = job.recipe.quota, _step(job)
    bounds = [f"{quota.rows} rows"] if quota.rows is not None else []
    bounds += [format_duration(quota.seconds)] if quota.seconds is not None else []
    return [*step_preview(job), f"in this run at most {' or '.join(bounds) or 'all of it'}"]


def _step(job: Job) -> tuple[str, Body, Preview]:
    if job.target not in STEPS:
        raise SettingsError(f"STEP {job.target or 'is missing'}: {', '.join(STEPS)} are accepted")
    return STEPS[job.target]


main = recipe_verb("top_up", top_up, preview=preview, about=__doc__, target="STEP")

if __name__ == "__main__":
    main.exit()
