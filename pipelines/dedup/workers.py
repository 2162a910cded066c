"""Runs the workers' part of a deduplication round: reads keys of fingerprints and writes verdicts.

Imports no network, so that a worker starts fast.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dedup.matching import MATCHES, REASON_ORDER, exact_key_table, first_reasons, phash_table
from pipelines.dedup.settings import CAPTION, IMAGE, URL
from pipelines.tables.commits import WrittenUnit, write_unit
from pipelines.tables.schemas import DUPLICATES
from pipelines.tables.unit_files import revised_name
from pipelines.tables.units import Unit


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A unit of FINGERPRINTS in the order of all rows.

    Attributes:
        path: of its data file.
        begin: the rank of its first row.
        rows: their number.
        new_unit: the unit, if this round gives verdicts on it; else None.
    """

    path: str
    begin: int
    rows: int
    new_unit: Unit | None = None


def unit_name(number: int, unit: str) -> str:
    """The name of a unit of DUPLICATES, from its round and the unit of FINGERPRINTS; names sort by round."""
    return f"r{number:06d}-{unit}"


def keys_of(segment: Segment, *, parts: int) -> pa.Table:
    """The exact keys of a unit's rows, of every kind that a row has."""
    rows = _columns(segment, ["url_key", "image_sha256", "caption_key"])
    columns = {
        URL: rows.column("url_key"),
        IMAGE: pa.array(map(_leading_bits, rows.column("image_sha256").to_pylist()), pa.int64()),
        CAPTION: rows.column("caption_key"),
    }
    return pa.concat_tables(
        exact_key_table(kind, *_ranked(column, segment), parts=parts) for kind, column in columns.items()
    )


def phashes_of(segment: Segment, *, parts: int) -> pa.Table:
    """The perceptual hashes of a unit's rows."""
    phash, rank = _ranked(_columns(segment, ["phash"]).column("phash"), segment)
    return phash_table(phash, rank, near=np.zeros(len(phash), bool), parts=parts)


def _ranked(column: pa.Array | pa.ChunkedArray, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """The values that are not null and the ranks of their rows, int64 [n] each."""
    valid = np.asarray(column.is_valid())
    values = column.drop_null().to_numpy().astype(np.int64)
    return values, segment.begin + np.flatnonzero(valid).astype(np.int64)


def _leading_bits(sha256: str | None) -> int | None:
    return None if sha256 is None else int.from_bytes(bytes.fromhex(sha256[:16]), "big", signed=True)


def _columns(segment: Segment, columns: Sequence[str]) -> pa.Table:
    with fsspec.open(segment.path, "rb") as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


_NAMED_MATCHES = pa.schema([*MATCHES, ("name", pa.string()), ("unit", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class VerdictWriter:
    """Turns matches of ranks into data files of verdicts on row ids.

    Attributes:
        url: of the table.
        number: of the round.
        settings: digest of the table's identity.
        inputs: digest of what the round is made from.
        segments: all units, in their order.
    """

    url: str
    number: int
    settings: str
    inputs: str
    segments: Sequence[Segment]

    def with_segment(self, matches: pa.Table) -> pa.Table:
        """The matches, each with the index of the segment of its earlier row."""
        return matches.append_column("segment", pa.array(self._segment_indices(matches.column("of"))))

    def named(self, matches: pa.Table) -> pa.Table:
        """Matches of earlier rows in one segment, with those rows' ids and the later rows' segments."""
        segment = self.segments[matches.column("segment")[0].as_py()]
        names = _columns(segment, ["id"]).column("id")
        indices = matches.column("of").to_numpy() - segment.begin
        units = pa.array(self._segment_indices(matches.column("rank")))
        columns = [*(matches.column(name) for name in MATCHES.names), names.take(pa.array(indices)), units]
        return pa.table(columns, schema=_NAMED_MATCHES)

    def placeholder(self, index: int) -> pa.Table:
        """A row of no rank for a segment, so that its unit is written even if it has no duplicate."""
        return pa.table([[-1], [0], [-1], [None], [index]], schema=_NAMED_MATCHES)

    def written(self, matches: pa.Table) -> pa.Table:
        """Write the data file of a unit from all matches of its rows; returns the pickled `WrittenUnit`."""
        segment = self.segments[matches.column("unit")[0].as_py()]
        names = dict(zip(matches.column("of").to_pylist(), matches.column("name").to_pylist(), strict=True))
        verdicts: list[str | None] = [None] * segment.rows
        of: list[str | None] = [None] * segment.rows
        for row in first_reasons(matches.select(MATCHES.names)).to_pylist():
            if row["rank"] >= 0:
                index = row["rank"] - segment.begin
                verdicts[index], of[index] = REASON_ORDER[row["reason"]], names[row["of"]]
        ids = _columns(segment, ["id"]).column("id")
        file = self._write(segment, pa.table([ids, verdicts, of], schema=DUPLICATES))
        return pa.table({"written": [pickle.dumps(file)]})

    def _write(self, segment: Segment, rows: pa.Table) -> WrittenUnit:
        if segment.new_unit is None:
            raise ValueError(f"{segment.path} is not new in this round, and has its verdicts already")
        unit = replace(segment.new_unit, name=unit_name(self.number, segment.new_unit.name))
        manifest = unit.manifest(
            settings=self.settings,
            environment={"round": self.inputs},
            rows_read=segment.rows,
            rows_written=rows.num_rows,
        )
        # The inputs are in the manifest and so in the file's name: a killed round that is made again of other
        # rows never takes a stale file for its own.
        return write_unit(rows, manifest, path=f"{self.url}/{revised_name(unit.name, manifest.to_json())}")

    def _segment_indices(self, ranks: pa.ChunkedArray) -> np.ndarray:
        """The index of the segment of each rank: int64 [n]."""
        begins = np.array([segment.begin for segment in self.segments])
        # Of segments that begin at one rank all but the last are empty.
        return np.searchsorted(begins, ranks.to_numpy(), side="right") - 1
