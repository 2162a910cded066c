"""Verify a table: recount it, compare files and log, and compute sampled units again from their keys.

Give the table's URL. LATENTS need their shards: the recipe's `source.url`, or `shards` beside the table.
TARGETS need `latents` beside the table. SAMPLES and REFERENCES need `evaluation` to be as their run had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import pyarrow as pa

from jobs.cli import Job, run
from jobs.distill_steps import sources
from jobs.evaluation import Contender
from jobs.exits import leave
from jobs.vetoes import latents_vetoes_of, vetoes_of
from pipelines import fingerprints, latents, pairs, references, samples, targets
from pipelines.account import Account
from pipelines.sources.webdataset import list_shards
from pipelines.tables import Snapshot, open_table
from pipelines.verification import CannotRemake, Remake, verify_table


class Unsound(RuntimeError):
    """A table that is not what it says it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.verify_table`."""
    return run("verify_table", verify, preview=preview, about=__doc__, argv=argv, target="URL", writes=False)


def verify(job: Job) -> None:
    """Print what was counted; raise if anything is wrong."""
    table = open_table(job.target)
    wanted = job.recipe.verification
    found = verify_table(table, remake=remake_for(job, table), units=wanted.units, seed=wanted.seed)
    counted = f"{found.units} units, {found.rows} rows, {found.rejected} rejected"
    print(f"{table.url}, version {table.version}: {counted}")
    print(f"  {found.remade} units made again, {found.exact} of them bit for bit")
    for note in found.notes:
        print(f"  {note}")
    if found.faults:
        shown = "\n".join(f"  {fault}" for fault in found.faults[:20])
        raise Unsound(f"{len(found.faults)} faults in {table.url}\n{shown}")
    print("  no fault found")


def remake_for(job: Job, table: Snapshot) -> Remake:
    """How units of this kind of table are made again."""
    recipe = job.recipe
    if table.identity["kind"] == "pairs":
        return pairs.remake(table, teacher=recipe.model)
    beside = job.target.rpartition("/")[0]
    if table.identity["kind"] == "targets":
        parents = open_table(f"{beside}/latents", kind="latents")
        teacher, _ = sources(replace(job, out=beside))
        return targets.remake(table, teacher=teacher, latents=parents)
    if table.identity["kind"] == "samples":
        # As `jobs.evaluate` leaves it, at OUT/evaluation/NAME.
        there, name = replace(job, out=beside.rpartition("/")[0]), job.target.rpartition("/")[2]
        drew = {one.name: one for one in recipe.evaluation.contenders}.get(name, Contender(name=name))
        return samples.remake(
            table,
            settings=recipe.evaluation.samples,
            model=there.source(drew.model or recipe.model),
            decoder=drew.decoder and there.source(drew.decoder),
        )
    if table.identity["kind"] == "references":
        wanted = recipe.evaluation
        return references.remake(table, settings=wanted.references, judging=wanted.samples.judging)
    if table.identity["kind"] == "duplicates":
        return _made_in_rounds
    shards = list_shards(recipe.source.url or f"{beside}/shards")
    there, source = replace(job, out=beside), recipe.source.name
    if table.identity["kind"] == "fingerprints":
        return fingerprints.remake(table, shards=shards, source=source, vetoes=vetoes_of(there))
    return latents.remake(
        table, model=recipe.model, shards=shards, source=source, vetoes=latents_vetoes_of(there)
    )


def _made_in_rounds(account: Account, _rows: pa.Table) -> NoReturn:
    raise CannotRemake(f"its round is made as a whole, and {account.unit} is a part of it")


def preview(job: Job) -> list[str]:
    """What would be looked at."""
    table = open_table(job.target)
    again = min(job.recipe.verification.units, len(table.units))
    return [
        f"would read {len(table.units)} units of {table.url}, version {table.version}, and make {again} again"
    ]


if __name__ == "__main__":
    leave(main())
