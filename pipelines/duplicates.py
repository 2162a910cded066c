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
from pydantic import Field

from pipelines.account import Account
from pipelines.commits import Origin, commit_round, restore_accounts
from pipelines.decontamination import EvaluationSet
from pipelines.fingerprints import Fingerprints
from pipelines.grouping import Read, Rows, read_on_ray
from pipelines.matching import (
    CAPTION,
    IMAGE,
    ORDER,
    URL,
    BlockIndex,
    Order,
    exact_matches,
    first_looks,
    near_looks,
    near_matches,
)
from pipelines.schemas import DUPLICATES
from pipelines.stages.fingerprint import METHOD
from pipelines.tables import Snapshot, TableError, UnitFile, accounts, create_table, open_table, unit_records
from pipelines.units import Unit
from pipelines.verdicts import Segment, Writing, keys_of, looks_of
from snapfusion.settings import Settings, digest


class Deduplication(Settings):
    """What counts as a copy, and of what.

    Attributes:
        use: whether LATENTS refuse copies; `jobs.find_duplicates` must have judged their shards.
        table: the place of the verdicts in the run; another for other settings or another evaluation.
        url: whether two rows of one address are copies.
        image: whether two rows of the same bytes of a picture are.
        caption: whether two rows of one caption are, apart from case and punctuation. Off, because on the web
            many pictures of one thing have one name.
        max_hamming: in how many of 64 bits the perceptual hashes of two pictures that look alike may differ;
            null compares none. Hashes of pictures with any detail have 32 ones, so differences are even.
        against: FINGERPRINTS of other runs, by their URLs: their rows come before all of this run's.
        evaluation: what a model will be judged by. Its captions count whatever `caption` is, and its pictures
            whatever `image` is.
        fingerprints: how FINGERPRINTS are made.
        rows_at_once: how many rows a worker holds of a group of many; about 100 bytes each.
    """

    use: bool = False
    table: str = Field("duplicates", pattern=r"^[A-Za-z0-9_.-]+$")
    url: bool = True
    image: bool = True
    caption: bool = False
    max_hamming: int | None = Field(4, ge=0, le=8)
    against: tuple[str, ...] = ()
    evaluation: EvaluationSet = EvaluationSet()
    fingerprints: Fingerprints = Fingerprints()
    rows_at_once: int = Field(1_000_000, ge=1)

    @property
    def kinds(self) -> frozenset[int]:
        """The kinds of keys that make copies."""
        asked = {URL: self.url, IMAGE: self.image, CAPTION: self.caption}
        return frozenset(kind for kind, wanted in asked.items() if wanted)


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
    restore_accounts(url)
    number = 1 + max((round_of(file.unit) for file in table.units), default=0)
    before = [file for other in ([evaluation] if evaluation else []) for file in other.units]
    judged_by = sum(file.rows for file in before)
    before += [file for other in against for file in other.units]
    judged, new = _judged_and_new(table, fingerprints)
    if not new:
        return open_table(url)
    segments = _segments([*before, *judged], new, accounts(fingerprints.url))
    order = Order(judged_by=judged_by, new=segments[len(segments) - len(new)].begin)
    writing = Writing(
        url=table.url,
        number=number,
        settings=digest(table.identity),
        state=_state(segments),
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
        and {"of": evaluation.identity["evaluation"], "content": content_of(evaluation)},
        "against": [{"table": table.url, "identity": digest(table.identity)} for table in against],
    }


def content_of(table: Snapshot) -> str:
    """SHA-256 of what a table holds: of its units and their files' hashes, wherever it lies."""
    held = {file.unit for file in table.units}
    records = unit_records(table.url)
    return digest([[one["unit"], one["sha256"]] for one in records if one["unit"] in held])


def count_verdicts(table: Snapshot) -> dict[str, int]:
    """Rows refused, by reason."""
    counts: Counter[str] = Counter()
    for file in table.units:
        for pair in pc.value_counts(table.read_unit(file, ["verdict"]).column("verdict")).to_pylist():
            counts[pair["values"]] += pair["counts"]
    return {reason: counts[reason] for reason in ORDER if counts[reason]}


def round_of(unit: str) -> int:
    """The round that a unit of DUPLICATES was judged in."""
    return int(unit.partition("-")[0][1:])


def _judged_and_new(table: Snapshot, fingerprints: Snapshot) -> tuple[list[UnitFile], list[UnitFile]]:
    """The units of FINGERPRINTS: those that have verdicts, by round, and those that have none, by name."""
    place = {file.unit.partition("-")[2]: number for number, file in enumerate(table.units)}
    judged = [file for file in fingerprints.units if file.unit in place]
    new = [file for file in fingerprints.units if file.unit not in place]
    return sorted(judged, key=lambda file: place[file.unit]), new


def _segments(
    before: Sequence[UnitFile], new: Sequence[UnitFile], known: Mapping[str, Account]
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


def _unit(account: Account) -> Unit:
    return Unit(
        name=account.unit,
        source=account.source,
        start=account.start,
        stop=account.stop,
        final=account.final,
        source_digest=account.source_digest,
    )


def _state(segments: Sequence[Segment]) -> str:
    """What a round was made from, as a hash of 16 digits."""
    told = [
        [segment.path.rpartition("/")[2], segment.rows, segment.asked is not None] for segment in segments
    ]
    return digest(told)[:16]


def _matches(settings: Deduplication, segments: Sequence[Segment], *, order: Order, read: Read) -> Rows:
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
    seen = read(segments, partial(looks_of, parts=many))
    if settings.max_hamming > 0:
        blocks = seen.grouped(partial(first_looks, index=index, parts=many), by="part")
        seen = seen.union(blocks.grouped(partial(near_looks, index=index, parts=many), by="part"))
    return found.union(seen.grouped(partial(near_matches, order=order), by="part"))
