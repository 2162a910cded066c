"""Recomputers of a run's tables: they find the inputs from which a table's units were made."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from jobs.cli.inputs import latents_row_filters, row_filters, teacher_and_student
from jobs.cli.job import Job
from jobs.evaluation.settings import Contender

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.tables.manifest import UnitManifest
    from pipelines.tables.table import Snapshot
    from pipelines.tables.verification import Recompute


def recompute_for(job: Job, table: Snapshot) -> Recompute:
    """The function that recomputes units of this kind of table."""
    from pipelines.datasets import latents, pairs, references, samples, targets
    from pipelines.dedup import fingerprints
    from pipelines.sources.webdataset import list_shards
    from pipelines.tables.compacted import compaction_of
    from pipelines.tables.table import open_table

    recipe, kind = job.recipe, table.identity["kind"]
    parent, _, name = job.target.rpartition("/")
    run_job, source = replace(job, out=parent), recipe.source.name
    if job.recipe.verification.units == 0:
        return _cannot_recompute  # and never called, so that no inputs are needed
    if compaction := compaction_of(table.identity):
        return _compaction_recomputer(table, parent=f"{parent}/{compaction['table']}")
    match kind:
        case "pairs":
            return pairs.recomputer(table, teacher=recipe.model)
        case "targets":
            teacher, _ = teacher_and_student(run_job)
            return targets.recomputer(
                table, teacher=teacher, latents=open_table(f"{parent}/latents", kind="latents")
            )
        case "samples":
            # `jobs.evaluate` writes them to OUT/evaluation/NAME.
            run_job = replace(job, out=parent.rpartition("/")[0])
            contenders = {contender.name: contender for contender in recipe.evaluation.contenders}
            contender = contenders.get(name, Contender(name=name))
            return samples.recomputer(
                table,
                settings=recipe.evaluation.samples,
                model=run_job.resolve(contender.model or recipe.model),
                decoder=contender.decoder and run_job.resolve(contender.decoder),
            )
        case "references":
            settings = recipe.evaluation
            return references.recomputer(
                table, settings=settings.references, metrics=settings.samples.judging
            )
        case "duplicates":
            return _cannot_recompute
    shards = list_shards(recipe.source.url or f"{parent}/shards")
    if kind == "fingerprints":
        return fingerprints.recomputer(table, shards=shards, source=source, filters=row_filters(run_job))
    return latents.recomputer(
        table, model=recipe.model, shards=shards, source=source, filters=latents_row_filters(run_job)
    )


def _compaction_recomputer(table: Snapshot, *, parent: str) -> Recompute:
    from pipelines.datasets import compaction
    from pipelines.tables.table import is_table, open_table

    if is_table(parent):
        return compaction.recomputer(table, parent=open_table(parent))

    def recompute(_manifest: UnitManifest, _rows: pa.Table) -> NoReturn:
        """Raises, since the rows are nowhere else."""
        from pipelines.tables.verification import CannotRecompute

        raise CannotRecompute(f"its parent {parent} is gone")

    return recompute


def _cannot_recompute(manifest: UnitManifest, _rows: pa.Table) -> NoReturn:
    from pipelines.tables.verification import CannotRecompute

    raise CannotRecompute(f"its round is made as a whole, and {manifest.unit} is a part of it")
