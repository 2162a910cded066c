"""What workers do in a round: keys out of fingerprints, and verdicts into data files.

No network is imported here, so that a worker is soon ready.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dedup.matching import (
    EXACT_KEYS,
    MATCHES,
    PHASHES,
    REASON_ORDER,
    exact_key_table,
    first_reasons,
    phash_table,
)
from pipelines.dedup.settings import CAPTION, IMAGE, URL
from pipelines.storage.objects import write_once
from pipelines.tables.commits import WrittenUnit, read_written_unit
from pipelines.tables.manifest import UnitManifest, to_parquet
from pipelines.tables.schemas import DUPLICATES
from pipelines.tables.table import revised_name
from pipelines.tables.units import Unit


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A unit of some FINGERPRINTS in the order of all rows.

    Attributes:
        path: of its data file.
        begin: the rank of its first row.
        rows: how many it has.
        asked: the unit, if verdicts on it are asked for in this round; else None.
    """

    path: str
    begin: int
    rows: int
    asked: Unit | None = None


def unit_name(number: int, unit: str) -> str:
    """The unit of DUPLICATES that a unit of FINGERPRINTS becomes in round `number`; they sort by round."""
    return f"r{number:06d}-{unit}"


def keys_of(segment: Segment, *, parts: int) -> pa.Table:
    """The keys of a unit's rows, of every kind that a row has."""
    held = _columns(segment, ["url_key", "image_sha256", "caption_key"])
    columns = {
        URL: held.column("url_key"),
        IMAGE: pa.array(map(_leading_bits, held.column("image_sha256").to_pylist()), pa.int64()),
        CAPTION: held.column("caption_key"),
    }
    tables = [
        exact_key_table(kind, *_ranked(column, segment), parts=parts) for kind, column in columns.items()
    ]
    return pa.concat_tables([EXACT_KEYS.empty_table(), *tables])


def phashes_of(segment: Segment, *, parts: int) -> pa.Table:
    """The perceptual hashes of a unit's rows."""
    phash, rank = _ranked(_columns(segment, ["phash"]).column("phash"), segment)
    return pa.concat_tables(
        [PHASHES.empty_table(), phash_table(phash, rank, near=np.zeros(len(phash), bool), parts=parts)]
    )


def _ranked(column: pa.Array | pa.ChunkedArray, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """The values that are there and the ranks of their rows, int64 [n] each."""
    there = np.asarray(column.is_valid())
    values = column.drop_null().to_numpy().astype(np.int64)
    return values, segment.begin + np.flatnonzero(there).astype(np.int64)


def _leading_bits(sha256: str | None) -> int | None:
    return None if sha256 is None else int.from_bytes(bytes.fromhex(sha256[:16]), "big", signed=True)


def _columns(segment: Segment, columns: Sequence[str]) -> pa.Table:
    with fsspec.open(segment.path, "rb") as file:
        return pq.read_table(file, columns=columns)


_NAMED = pa.schema([*MATCHES, ("name", pa.string()), ("unit", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class VerdictWriter:
    """From matches by rank to data files by name.

    Attributes:
        url: of the table.
        number: of the round.
        settings: digest of the table's identity.
        state: what the round was made from.
        segments: all units, in their order.
    """

    url: str
    number: int
    settings: str
    state: str
    segments: Sequence[Segment]

    def with_segment(self, matches: pa.Table) -> pa.Table:
        """The matches, each with the place of the unit whose row came first."""
        return matches.append_column("segment", pa.array(self._places(matches.column("of"))))

    def named(self, matches: pa.Table) -> pa.Table:
        """The matches whose first rows are of one unit, with those rows' ids and their own rows' units."""
        segment = self.segments[matches.column("segment")[0].as_py()]
        names = _columns(segment, ["id"]).column("id")
        at = matches.column("of").to_numpy() - segment.begin
        units = pa.array(self._places(matches.column("rank")))
        columns = [*(matches.column(name) for name in MATCHES.names), names.take(pa.array(at)), units]
        return pa.table(columns, schema=_NAMED)

    def placeholder(self, place: int) -> pa.Table:
        """A row for a unit, so that it is written though none of its rows be a copy; its rank is nobody's."""
        return pa.table([[-1], [0], [-1], [None], [place]], schema=_NAMED)

    def written(self, matches: pa.Table) -> pa.Table:
        """The data file of a unit, made of all that is found of its rows."""
        segment = self.segments[matches.column("unit")[0].as_py()]
        names = dict(zip(matches.column("of").to_pylist(), matches.column("name").to_pylist(), strict=True))
        verdicts: list[str | None] = [None] * segment.rows
        of: list[str | None] = [None] * segment.rows
        for row in first_reasons(matches.select(MATCHES.names)).to_pylist():
            if row["rank"] >= 0:
                place = row["rank"] - segment.begin
                verdicts[place], of[place] = REASON_ORDER[row["reason"]], names[row["of"]]
        ids = _columns(segment, ["id"]).column("id")
        file = self._file(segment, pa.table([ids, verdicts, of], schema=DUPLICATES))
        return pa.table({"written": [pickle.dumps(file)]})

    def _file(self, segment: Segment, rows: pa.Table) -> WrittenUnit:
        asked = segment.asked
        if asked is None:
            raise ValueError(f"verdicts on {segment.path} are given, which are not asked for in this round")
        account = UnitManifest(
            unit=unit_name(self.number, asked.name),
            source=asked.source,
            start=asked.start,
            stop=asked.stop,
            final=asked.final,
            source_digest=asked.source_digest,
            settings=self.settings,
            environment={"round": self.state},
            rows_read=segment.rows,
            rows_written=rows.num_rows,
        )
        data = to_parquet(rows, account)
        # What the round was made from is in the account and so in the name: another round's file is another.
        path = f"{self.url}/{revised_name(account.unit, account.to_json())}"
        if not write_once(path, data):
            return read_written_unit(path)
        return WrittenUnit(
            manifest=account, path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest(), seconds=None
        )

    def _places(self, ranks: pa.ChunkedArray) -> np.ndarray:
        """In which segments rows of these ranks are: int64 [n]."""
        begins = np.array([segment.begin for segment in self.segments])
        # Of segments that begin at one rank all but the last are empty.
        return np.searchsorted(begins, ranks.to_numpy(), side="right") - 1
