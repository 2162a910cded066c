"""DUPLICATES: which rows of FINGERPRINTS copy an earlier one, judged in rounds.

fingerprints ─ keys ─ grouped by key ─ first of each group ─ matches ─ grouped by unit ─ data file ─ commit

A round judges the units that no earlier round has, against all earlier ones and each other. What is judged
stays judged, so a table that grows by rounds refuses the same rows to whoever reads it first and last. All
rows stand in one order: the evaluation's, other tables', those of earlier rounds, those of this one; within
each by unit name, so by source and place. A row is refused if any earlier one matches, be that kept or not.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import pyarrow.compute as pc

from pipelines.dedup.matching import (
    REASON_ORDER,
    BlockIndex,
    RankBounds,
    exact_matches,
    near_matches,
    near_phashes,
    phash_blocks,
)
from pipelines.dedup.settings import Deduplication
from pipelines.dedup.workers import Segment, VerdictWriter, keys_of, phashes_of
from pipelines.ray_data.shuffle import Read, Rows, read_on_ray
from pipelines.stages.fingerprint import METHOD
from pipelines.tables.commits import Origin, commit_round, restore_manifests
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import DUPLICATES
from pipelines.tables.table import Snapshot, TableError, UnitFile, create_table, open_table
from pipelines.tables.units import Unit
from snapfusion.settings import digest


def find_duplicates(
    settings: Deduplication,
    *,
    fingerprints: Snapshot,
    url: str,
    evaluation: Snapshot | None = None,
    against: Sequence[Snapshot] = (),
    origin: Origin | None = None,
    read: Read = read_on_ray,
) -> Snapshot:
    """Judge what is not judged yet, as one round and in one commit; returns the newest version.

    A round that is killed and made again writes the same bytes. One that was killed and is made again of
    other rows writes other files; those of the dead one are never committed.

    Args:
        settings: what counts.
        fingerprints: whose rows are judged, at this version.
        url: of the table.
        evaluation: fingerprints of what a model will be judged by.
        against: fingerprints whose rows come before.
        origin: who makes the round, and from what.
        read: what brings rows together.

    Raises:
        TableError: if the table was made with other settings, another evaluation or other fingerprints; if
            fingerprints were made otherwise and cannot be compared; or if another run judged meanwhile.
    """
    identity = identity_of(settings, fingerprints=fingerprints, evaluation=evaluation, against=against)
    table = create_table(url, schema=DUPLICATES, identity=identity)
    table = restore_manifests(table)
    number = 1 + max((round_of(file.unit) for file in table.units), default=0)
    before = [file for other in ([evaluation] if evaluation else []) for file in other.units]
    judged_by = sum(file.rows for file in before)
    before += [file for other in against for file in other.units]
    judged, new = _known_and_new(table, fingerprints)
    if not new:
        return open_table(url)
    segments = _segments([*before, *judged], new, fingerprints.manifests())
    order = RankBounds(judged_by=judged_by, new=segments[len(segments) - len(new)].begin)
    writing = VerdictWriter(
        url=table.url,
        number=number,
        settings=digest(table.identity),
        state=_round_digest(segments),
        segments=segments,
    )
    matches = _matches(settings, segments, order=order, read=read)
    named = matches.map(writing.with_segment).grouped(writing.named, by="segment")
    asked = [place for place, segment in enumerate(segments) if segment.asked]
    files = named.union(read(asked, writing.placeholder)).grouped(writing.written, by="unit").tables()
    written = [pickle.loads(file) for some in files for file in some.column("written").to_pylist()]
    if not commit_round(url, sorted(written, key=lambda file: file.path), number=number, origin=origin):
        raise TableError(f"another run has judged rows of {url} meanwhile; run again to judge what is left")
    return open_table(url)


def identity_of(
    settings: Deduplication,
    *,
    fingerprints: Snapshot,
    evaluation: Snapshot | None,
    against: Sequence[Snapshot],
) -> dict[str, Any]:
    """Everything that determines verdicts but the rows that are judged, and in which rounds.

    Raises:
        TableError: if fingerprints were made by another method.
    """
    for table in (fingerprints, *against, *([evaluation] if evaluation else [])):
        if table.identity.get("method") != METHOD:
            raise TableError(
                f"{table.url} holds fingerprints of another kind; make them again to compare them"
            )
    return {
        "kind": "duplicates",
        "url": settings.url,
        "image": settings.image,
        "caption": settings.caption,
        "max_hamming": settings.max_hamming,
        "fingerprints": fingerprints.identity,
        "evaluation": evaluation
        and {"of": evaluation.identity["evaluation"], "content": content_digest(evaluation)},
        "against": [{"table": table.url, "identity": digest(table.identity)} for table in against],
    }


def content_digest(table: Snapshot) -> str:
    """SHA-256 of what a table holds: of its units and their files' hashes, wherever it lies."""
    held = {file.unit for file in table.units}
    records = table.unit_records()
    return digest([[one["unit"], one["sha256"]] for one in records if one["unit"] in held])


def count_verdicts(table: Snapshot) -> dict[str, int]:
    """Rows refused, by reason."""
    counts: Counter[str] = Counter()
    for file in table.units:
        for pair in pc.value_counts(table.read_unit(file, ["verdict"]).column("verdict")).to_pylist():
            counts[pair["values"]] += pair["counts"]
    return {reason: counts[reason] for reason in REASON_ORDER if counts[reason]}


def round_of(unit: str) -> int:
    """The round that a unit of DUPLICATES was judged in."""
    return int(unit.partition("-")[0][1:])


def _known_and_new(table: Snapshot, fingerprints: Snapshot) -> tuple[list[UnitFile], list[UnitFile]]:
    """The units of FINGERPRINTS: those that have verdicts, by round, and those that have none, by name."""
    place = {file.unit.partition("-")[2]: number for number, file in enumerate(table.units)}
    judged = [file for file in fingerprints.units if file.unit in place]
    new = [file for file in fingerprints.units if file.unit not in place]
    return sorted(judged, key=lambda file: place[file.unit]), new


def _segments(
    before: Sequence[UnitFile], new: Sequence[UnitFile], known: Mapping[str, UnitManifest]
) -> list[Segment]:
    files = [*before, *new]
    begins = accumulate((file.rows for file in files), initial=0)
    return [
        Segment(
            path=file.path,
            begin=begin,
            rows=file.rows,
            asked=_unit(known[file.unit]) if place >= len(before) else None,
        )
        for place, (file, begin) in enumerate(zip(files, begins, strict=False))
    ]


def _unit(account: UnitManifest) -> Unit:
    return Unit(
        name=account.unit,
        source=account.source,
        start=account.start,
        stop=account.stop,
        final=account.final,
        source_digest=account.source_digest,
    )


def _round_digest(segments: Sequence[Segment]) -> str:
    """What a round was made from, as a hash of 16 digits."""
    told = [
        [segment.path.rpartition("/")[2], segment.rows, segment.asked is not None] for segment in segments
    ]
    return digest(told)[:16]


def _matches(settings: Deduplication, segments: Sequence[Segment], *, order: RankBounds, read: Read) -> Rows:
    """`MATCHES` of all rows asked for, several of a row that has several reasons."""
    rows = sum(segment.rows for segment in segments)

    def parts(each: int) -> int:
        return max(1, math.ceil(rows * each / settings.rows_at_once))

    keys = read(segments, partial(keys_of, parts=parts(3)))
    found = keys.grouped(partial(exact_matches, order=order, kinds=settings.kinds), by="part")
    if settings.max_hamming is None:
        return found
    index = BlockIndex.for_rows(rows, max_hamming=settings.max_hamming)
    many = parts(len(index))
    seen = read(segments, partial(phashes_of, parts=many))
    if settings.max_hamming > 0:
        blocks = seen.grouped(partial(phash_blocks, index=index, parts=many), by="part")
        seen = seen.union(blocks.grouped(partial(near_phashes, index=index, parts=many), by="part"))
    return found.union(seen.grouped(partial(near_matches, order=order), by="part"))
