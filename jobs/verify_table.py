"""Verify a table: recount it, compare files and log, and compute sampled units again from their keys.

Give the table's URL. LATENTS need their shards: the recipe's `source.url`, or `shards` beside the table.
TARGETS need `latents` beside the table. SAMPLES and REFERENCES need `evaluation` to be as their run had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import pyarrow as pa

from jobs.cli.inputs import latents_row_filters, row_filters, teacher_and_student
from jobs.cli.job import Job, run
from jobs.evaluation.settings import Contender
from jobs.runtime.exit_codes import exit_process
from pipelines.datasets import latents, pairs, references, samples, targets
from pipelines.dedup import fingerprints
from pipelines.sources.webdataset import list_shards
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import Snapshot, open_table
from pipelines.tables.verification import CannotRecompute, Recompute, verify_table


class VerificationFailed(RuntimeError):
    """A table that is not what it says it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.verify_table`."""
    return run("verify_table", verify, preview=preview, about=__doc__, argv=argv, target="URL", writes=False)


def verify(job: Job) -> None:
    """Print what was counted; raise if anything is wrong."""
    table = open_table(job.target)
    wanted = job.recipe.verification
    found = verify_table(table, recompute=remake_for(job, table), units=wanted.units, seed=wanted.seed)
    counted = f"{found.units} units, {found.rows} rows, {found.rejected} rejected"
    print(f"{table.url}, version {table.version}: {counted}")
    print(f"  {found.recomputed} units made again, {found.exact} of them bit for bit")
    for note in found.notes:
        print(f"  {note}")
    if found.faults:
        shown = "\n".join(f"  {fault}" for fault in found.faults[:20])
        raise VerificationFailed(f"{len(found.faults)} faults in {table.url}\n{shown}")
    print("  no fault found")


def remake_for(job: Job, table: Snapshot) -> Recompute:
    """How units of this kind of table are made again."""
    recipe = job.recipe
    if table.identity["kind"] == "pairs":
        return pairs.recomputer(table, teacher=recipe.model)
    beside = job.target.rpartition("/")[0]
    if table.identity["kind"] == "targets":
        parents = open_table(f"{beside}/latents", kind="latents")
        teacher, _ = teacher_and_student(replace(job, out=beside))
        return targets.recomputer(table, teacher=teacher, latents=parents)
    if table.identity["kind"] == "samples":
        # As `jobs.evaluate` leaves it, at OUT/evaluation/NAME.
        there, name = replace(job, out=beside.rpartition("/")[0]), job.target.rpartition("/")[2]
        drew = {one.name: one for one in recipe.evaluation.contenders}.get(name, Contender(name=name))
        return samples.recomputer(
            table,
            settings=recipe.evaluation.samples,
            model=there.resolve(drew.model or recipe.model),
            decoder=drew.decoder and there.resolve(drew.decoder),
        )
    if table.identity["kind"] == "references":
        wanted = recipe.evaluation
        return references.recomputer(table, settings=wanted.references, judging=wanted.samples.judging)
    if table.identity["kind"] == "duplicates":
        return _made_in_rounds
    shards = list_shards(recipe.source.url or f"{beside}/shards")
    there, source = replace(job, out=beside), recipe.source.name
    if table.identity["kind"] == "fingerprints":
        return fingerprints.recomputer(table, shards=shards, source=source, vetoes=row_filters(there))
    return latents.recomputer(
        table, model=recipe.model, shards=shards, source=source, vetoes=latents_row_filters(there)
    )


def _made_in_rounds(account: UnitManifest, _rows: pa.Table) -> NoReturn:
    raise CannotRecompute(f"its round is made as a whole, and {account.unit} is a part of it")


def preview(job: Job) -> list[str]:
    """What would be looked at."""
    table = open_table(job.target)
    again = min(job.recipe.verification.units, len(table.units))
    return [
        f"would read {len(table.units)} units of {table.url}, version {table.version}, and make {again} again"
    ]


if __name__ == "__main__":
    exit_process(main())
