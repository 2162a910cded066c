"""DUPLICATES: verdicts on rows of FINGERPRINTS that duplicate an earlier row, found in rounds.

fingerprints ─ keys ─ grouped by key ─ first of each group ─ matches ─ grouped by unit ─ data file ─ commit

A round checks the units that are new since the last one, against all earlier rows and each other. A verdict
never changes, so a reader that follows a growing table rejects the same rows as one that reads it at the end.
All rows have one order: the evaluation's, other tables', those of earlier rounds, those of this round; within
each by unit name, so by source and ordinal. A row is a duplicate if it matches any earlier row, be that a
duplicate itself or not.
"""

import math
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from pipelines.dedup import matching
from pipelines.dedup.matching import REASON_ORDER, BlockIndex, RankBounds
from pipelines.dedup.settings import Deduplication
from pipelines.dedup.workers import Segment, VerdictWriter, keys_of, phashes_of
from pipelines.ray_data.shuffle import Read, Rows, read_on_ray
from pipelines.stages.fingerprint import METHOD
from pipelines.tables.commits import Origin, commit_round, restore_manifests
from pipelines.tables.leases import write_lease
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import DUPLICATES
from pipelines.tables.table import Snapshot, TableError, create_table, open_table
from pipelines.tables.unit_files import UnitFile
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
    """Check the units that have no verdicts, as one round and in one commit; returns the newest version.

    A killed round that is repeated writes the same bytes; if its inputs have changed, it writes other files,
    and those of the killed round are never committed.

    Args:
        settings: criteria of duplicates.
        fingerprints: of the rows to check, at this version.
        url: of the table.
        evaluation: fingerprints of the evaluation set.
        against: fingerprints whose rows precede.
        origin: job that makes the round, and its parents.
        read: reads and groups rows.

    Raises:
        TableError: if the table was made with other settings, another evaluation or other fingerprints; if
            fingerprints of different methods are compared; or if another run has committed a round meanwhile.
    """
    identity = identity_of(settings, fingerprints=fingerprints, evaluation=evaluation, against=against)
    table = restore_manifests(create_table(url, schema=DUPLICATES, identity=identity))
    known, new = _known_and_new(table, fingerprints)
    if not new:
        return table
    evaluated = [] if evaluation is None else evaluation.units
    before = [*evaluated, *(file for other in against for file in other.units), *known]
    segments = _segments(before, new, fingerprints.manifests())
    evaluation_end = sum(file.rows for file in evaluated)
    bounds = RankBounds(evaluation_end=evaluation_end, new_begin=segments[len(before)].begin)
    number = 1 + max((round_of(file.unit) for file in table.units), default=0)
    settings_digest, inputs = digest(table.identity), _round_digest(segments)
    writer = VerdictWriter(
        url=table.url, number=number, settings=settings_digest, inputs=inputs, segments=segments
    )
    with write_lease(table.url, purpose=f"round {number}"):
        matches = _matches(settings, segments, bounds=bounds, read=read)
        named = matches.map(writer.with_segment).grouped(writer.named, by="segment")
        # A unit without duplicates has no match, and must be written all the same to count as checked.
        placeholders = read(range(len(before), len(segments)), writer.placeholder)
        tables = named.union(placeholders).grouped(writer.written, by="unit").tables()
        written = [pickle.loads(file) for rows in tables for file in rows.column("written").to_pylist()]
        # Sorted, so that a repeated round writes the same log entry.
        if not commit_round(url, sorted(written, key=lambda file: file.path), number=number, origin=origin):
            raise TableError(f"another run has committed round {number} of {url}; run again for the rest")
    return open_table(url)


def identity_of(
    settings: Deduplication,
    *,
    fingerprints: Snapshot,
    evaluation: Snapshot | None,
    against: Sequence[Snapshot],
) -> dict[str, Any]:
    """Everything that determines verdicts but the rows, and in which rounds they are checked.

    Raises:
        TableError: if fingerprints of another method are among the tables.
    """
    for table in (fingerprints, *against, *([evaluation] if evaluation else [])):
        if table.identity.get("method") != METHOD:
            raise TableError(f"{table.url} holds fingerprints of another method; make a new table of them")
    return {
        "kind": "duplicates",
        **settings.model_dump(include={"url", "image", "caption", "max_hamming"}),
        "fingerprints": fingerprints.identity,
        "evaluation": evaluation
        and {"of": evaluation.identity["evaluation"], "content": content_digest(evaluation)},
        "against": [{"table": table.url, "identity": digest(table.identity)} for table in against],
    }


def content_digest(table: Snapshot) -> str:
    """SHA-256 of a table's units and the hashes of their files, independent of its URL and later versions."""
    return digest([[record.unit, record.sha256] for record in table.unit_records()])


def count_verdicts(table: Snapshot) -> dict[str, int]:
    """The number of duplicates by reason."""
    counts: Counter[str | None] = Counter()
    for file in table.units:
        counts.update(table.read_unit(file, ["verdict"]).column("verdict").to_pylist())
    return {reason: counts[reason] for reason in REASON_ORDER if counts[reason]}


def round_of(unit: str) -> int:
    """The round of a unit of DUPLICATES."""
    return int(unit.partition("-")[0][1:])


def _known_and_new(table: Snapshot, fingerprints: Snapshot) -> tuple[list[UnitFile], list[UnitFile]]:
    """The units of FINGERPRINTS that have verdicts, by round, and those that have none, by name."""
    indices = {file.unit.partition("-")[2]: index for index, file in enumerate(table.units)}
    known = [file for file in fingerprints.units if file.unit in indices]
    new = [file for file in fingerprints.units if file.unit not in indices]
    return sorted(known, key=lambda file: indices[file.unit]), new


def _segments(
    before: Sequence[UnitFile], new: Sequence[UnitFile], manifests: Mapping[str, UnitManifest]
) -> list[Segment]:
    files = [*before, *new]
    begins = accumulate((file.rows for file in files), initial=0)
    units = [*[None] * len(before), *(Unit.of(manifests[file.unit]) for file in new)]
    return [
        Segment(path=file.path, begin=begin, rows=file.rows, new_unit=unit)
        for file, begin, unit in zip(files, begins, units, strict=False)
    ]


def _round_digest(segments: Sequence[Segment]) -> str:
    """The inputs of a round as a hash of 16 digits."""
    inputs = [[one.path.rpartition("/")[2], one.rows, one.new_unit is not None] for one in segments]
    return digest(inputs)[:16]


def _matches(settings: Deduplication, segments: Sequence[Segment], *, bounds: RankBounds, read: Read) -> Rows:
    """`MATCHES` of all new rows; a row with several reasons has several."""
    rows = sum(segment.rows for segment in segments)

    def num_parts(keys_per_row: int) -> int:
        return max(1, math.ceil(rows * keys_per_row / settings.rows_at_once))

    # Up to three exact keys a row.
    keys = read(segments, partial(keys_of, parts=num_parts(3)))
    matches = keys.grouped(partial(matching.exact_matches, bounds=bounds, kinds=settings.kinds), by="part")
    if settings.max_hamming is None:
        return matches
    index = BlockIndex.for_rows(rows, max_hamming=settings.max_hamming)
    parts = num_parts(len(index))
    phashes = read(segments, partial(phashes_of, parts=parts))
    if settings.max_hamming > 0:
        blocks = phashes.grouped(partial(matching.phash_blocks, index=index, parts=parts), by="part")
        near = blocks.grouped(partial(matching.near_phashes, index=index, parts=parts), by="part")
        phashes = phashes.union(near)
    return matches.union(phashes.grouped(partial(matching.near_matches, bounds=bounds), by="part"))
