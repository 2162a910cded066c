"""What refuses rows of LATENTS beside the selection, by the recipe and by what lies in the run."""

from __future__ import annotations

from jobs.cli.job import Job
from jobs.training.run_folder import METRICS
from pipelines.dedup.decontamination import describe_evaluation
from pipelines.dedup.fingerprints import identity_of
from pipelines.stages.blocklist import load_blocklist
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.stages.duplicates import DuplicateFilter
from pipelines.stages.row_filter import RowFilter
from pipelines.storage.objects import absolute_url, exists
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.schemas import SCHEMA_VERSION
from pipelines.tables.table import TableError, is_table, open_table
from snapfusion.settings import differences


def row_filters(job: Job) -> list[RowFilter]:
    """What refuses a row whatever other rows there are: before it is downloaded, hashed and encoded."""
    return [DeletionFilter(deletion_list_of(job)), load_blocklist(job.recipe.source.blocklists)]


def deletion_list_of(job: Job) -> DeletionList:
    """What this run was asked to forget, which need not be anything."""
    return DeletionList(job.url("forgotten"))


def latents_row_filters(job: Job) -> list[RowFilter]:
    """The vetoes under which this run encodes, and verifies what it encoded: copies are refused too.

    Raises:
        TableError: if copies are to be refused and no verdicts are there, or verdicts on other rows.
    """
    vetoes = row_filters(job)
    settings = job.recipe.deduplication
    if not settings.use:
        return vetoes
    place = job.url(settings.table)
    if not is_table(place):
        raise TableError(
            f"{place} is not there, and deduplication.use is set: run jobs.find_duplicates first"
        )
    table = open_table(place, kind="duplicates")
    wanted = {
        **{name: getattr(settings, name) for name in ("url", "image", "caption", "max_hamming")},
        "fingerprints": {
            **identity_of(settings.fingerprints, latents=job.recipe.latents, vetoes=vetoes),
            "schema_version": SCHEMA_VERSION,
        },
    }
    told = {name: table.identity[name] for name in wanted}
    judged_by = table.identity["evaluation"]
    told["evaluation"] = judged_by and judged_by["of"]
    wanted["evaluation"] = describe_evaluation(settings.evaluation) if settings.evaluation.places else None
    told["against"] = [one["table"] for one in table.identity["against"]]
    wanted["against"] = [absolute_url(url) for url in settings.against]
    if differing := list(differences(told, wanted)):
        raise TableError(f"{place} was made otherwise: {'; '.join(differing[:3])}; run jobs.find_duplicates")
    return [*vetoes, DuplicateFilter(url=table.url, version=table.version, source=job.recipe.source.name)]


def teacher_and_student(job: Job) -> tuple[str, str]:
    """Where the teacher and the student's first weights are."""
    settings = job.recipe.distill
    made = exists(job.url(f"vpred/{METRICS}"))
    default = "run:vpred/model" if made else job.recipe.model
    teacher = settings.teacher or default
    return job.resolve(teacher), job.resolve(settings.student or teacher)


def distillation_table_url(job: Job) -> str:
    """The table that the student is taught from."""
    if job.recipe.distill.table is not None:
        return job.resolve(job.recipe.distill.table)
    return job.url("latents" if job.recipe.distill.targets == "online" else "targets")


def shards_url(job: Job) -> str:
    """The recipe's shards, or else those rendered into the run."""
    return job.recipe.source.url or job.url("shards")


def latency_table_url(job: Job) -> str:
    """The file of the run's table."""
    return job.url(f"latency/{job.recipe.latency.name}.json")
