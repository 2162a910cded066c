"""Inputs of a job in its run: row filters, sources of models, URLs of tables and shards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.cli.job import Job
from jobs.runtime.logs import logger
from jobs.training.metrics import METRICS
from pipelines.storage.objects import absolute_url, exists
from snapfusion.settings import differences

if TYPE_CHECKING:
    from pipelines.sources.webdataset import Shard
    from pipelines.stages.row_filter import LinkFilter, RowFilter
    from pipelines.tables.deletion_list import DeletionList


def row_filters(job: Job) -> list[RowFilter]:
    """Filters that refuse a row by itself, before it is downloaded, hashed or encoded."""
    from pipelines.stages.blocklist import load_blocklist
    from pipelines.stages.deletion_filter import DeletionFilter

    return [DeletionFilter(deletion_list_of(job)), load_blocklist(job.recipe.source.blocklists)]


def link_filters(job: Job) -> list[LinkFilter]:
    """The row filters that need no image, so that they apply before a download."""
    from pipelines.stages.row_filter import LinkFilter

    return [row_filter for row_filter in row_filters(job) if isinstance(row_filter, LinkFilter)]


def deletion_list_of(job: Job) -> DeletionList:
    """The deletion list of this run, which may not exist."""
    from pipelines.tables.deletion_list import DeletionList

    return DeletionList(job.url("forgotten"))


def latents_row_filters(job: Job) -> list[RowFilter]:
    """Filters of the rows that this run encodes and verifies, which refuse copies too.

    Raises:
        TableError: if copies are refused and there are no verdicts, or verdicts with other settings.
    """
    from pipelines.dedup.decontamination import describe_evaluation
    from pipelines.dedup.fingerprints import identity_of
    from pipelines.stages.duplicate_filter import DuplicateFilter
    from pipelines.tables.schemas import SCHEMA_VERSION
    from pipelines.tables.table import TableError, is_table, open_table

    filters = row_filters(job)
    settings = job.recipe.deduplication
    if not settings.use:
        return filters
    url = job.url(settings.table)
    if not is_table(url):
        raise TableError(
            f"{url} does not exist, and deduplication.use is set: run jobs.find_duplicates first"
        )
    table = open_table(url, kind="duplicates")
    fingerprints = identity_of(settings.fingerprints, latents=job.recipe.latents, filters=filters)
    expected = {
        **{name: getattr(settings, name) for name in ("url", "image", "caption", "max_hamming")},
        "fingerprints": {**fingerprints, "schema_version": SCHEMA_VERSION},
        "evaluation": describe_evaluation(settings.evaluation) if settings.evaluation.urls else None,
        "against": [absolute_url(against) for against in settings.against],
    }
    # The table also records the versions of what it was compared with, which may be older than today's.
    evaluation = table.identity["evaluation"]
    recorded = {
        **{name: table.identity[name] for name in expected},
        "evaluation": evaluation and evaluation["of"],
        "against": [one["table"] for one in table.identity["against"]],
    }
    if differing := list(differences(recorded, expected)):
        raise TableError(f"{url} has other settings: {'; '.join(differing[:3])}; run jobs.find_duplicates")
    return [*filters, DuplicateFilter(url=table.url, version=table.version, source=job.recipe.source.name)]


def teacher_and_student(job: Job) -> tuple[str, str]:
    """Sources of the teacher and of the student's initial weights."""
    settings = job.recipe.distill
    default = "run:vpred/model" if exists(job.url(f"vpred/{METRICS}")) else job.recipe.model
    teacher = settings.teacher or default
    return job.resolve(teacher), job.resolve(settings.student or teacher)


def distillation_table_url(job: Job) -> str:
    """URL of the table that the student is distilled on."""
    distill = job.recipe.distill
    return job.url(distill.table_kind) if distill.table is None else job.resolve(distill.table)


def check_distillation_table(job: Job) -> None:
    """Refuse a table of another kind or grid than the distillation needs, if there is one already.

    Raises:
        TableError: naming what differs. Models are compared when they are loaded.
    """
    from pipelines.datasets.settings import differing_targets, refused_targets
    from pipelines.tables.table import TableError, is_table, open_table

    distill, url = job.recipe.distill, distillation_table_url(job)
    if not is_table(url):
        return
    table = open_table(url, kind=distill.table_kind)
    if distill.table_kind != "targets":
        return
    if differing := differing_targets(table.identity["teaching"], distill.targets_settings):
        raise TableError(refused_targets(url, differing))


def shards_url(job: Job) -> str:
    """URL of the recipe's shards, or of those rendered into the run."""
    return job.recipe.source.url or job.url("shards")


def finished_shards(job: Job) -> list[Shard]:
    """The shards at `shards_url` without those that seem to be still written, which are logged.

    Raises:
        SourceError: if there is none.
    """
    from pipelines.sources import SourceError
    from pipelines.sources.readiness import unfinished_shards
    from pipelines.sources.webdataset import list_shards

    settle = job.recipe.source.settle
    shards = list_shards(shards_url(job))
    waiting = set(unfinished_shards(shards, settle=settle))
    if waiting:
        count = f"{len(waiting)} of {len(shards)} shards wait"
        reason = f"changed less than {settle:g} s ago, without _stats.json or without an end"
        first = min(shard.url for shard in waiting)
        line = f"{count} ({reason}), such as {first}; run again later, or set source.settle=0"
        if len(waiting) == len(shards):
            raise SourceError(line)
        logger.info(f"  {line}")
    return [shard for shard in shards if shard not in waiting]


def latents_sources(job: Job) -> list[str]:
    """The names of the sources of the run's LATENTS, in the order in which `encode_latents` reads them.

    Raises:
        SourceError: if there is no finished shard.
    """
    return [f"{job.recipe.source.name}/{shard.name}" for shard in finished_shards(job)]


def log_refused(line: str) -> None:
    """Log that a shard is refused."""
    logger.info(f"  refused: {line}; restore it, or give the set of shards another source name")


def latency_table_url(job: Job) -> str:
    """URL of the run's latency table."""
    return job.url(f"latency/{job.recipe.latency.name}.json")
