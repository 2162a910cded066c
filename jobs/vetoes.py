"""What refuses rows of LATENTS beside the selection, by the recipe and by what lies in the run."""

from __future__ import annotations

from jobs.cli import Job
from pipelines.decontamination import describe
from pipelines.fingerprints import identity_of
from pipelines.forgotten import ForgottenList
from pipelines.schemas import SCHEMA_VERSION
from pipelines.stages.blocklist import load_blocklist
from pipelines.stages.duplicates import RefuseCopies
from pipelines.stages.veto import Veto
from pipelines.stages.withhold import Withhold
from pipelines.storage import absolute
from pipelines.tables import TableError, is_table, open_table
from snapfusion.settings import differences


def vetoes_of(job: Job) -> list[Veto]:
    """What refuses a row whatever other rows there are: before it is downloaded, hashed and encoded."""
    return [Withhold(forgotten_by(job)), load_blocklist(job.recipe.source.blocklists)]


def forgotten_by(job: Job) -> ForgottenList:
    """What this run was asked to forget, which need not be anything."""
    return ForgottenList(job.place("forgotten"))


def latents_vetoes_of(job: Job) -> list[Veto]:
    """The vetoes under which this run encodes, and verifies what it encoded: copies are refused too.

    Raises:
        TableError: if copies are to be refused and no verdicts are there, or verdicts on other rows.
    """
    vetoes = vetoes_of(job)
    settings = job.recipe.deduplication
    if not settings.use:
        return vetoes
    place = job.place(settings.table)
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
    wanted["evaluation"] = describe(settings.evaluation) if settings.evaluation.places else None
    told["against"] = [one["table"] for one in table.identity["against"]]
    wanted["against"] = [absolute(url) for url in settings.against]
    if differing := list(differences(told, wanted)):
        raise TableError(f"{place} was made otherwise: {'; '.join(differing[:3])}; run jobs.find_duplicates")
    return [*vetoes, RefuseCopies(url=table.url, version=table.version, source=job.recipe.source.name)]
