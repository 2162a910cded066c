"""The manifest of a unit of work: its range of the source, its row counts and its rejected rows.

It is stored in the Parquet footer of the unit's data file, so a committed file is enough to restore
everything else. It holds nothing that differs between two runs of the same work: no times, no host names.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejection
from pipelines.sources.tears import Tear

_KEY = b"snapfusion.account"
# Latents and PNGs do not compress; captions and padded token ids shrink tenfold.
_COMPRESSION = {"caption": "zstd", "token_ids": "zstd"}


@dataclass(frozen=True, kw_only=True)
class SourceRange:
    """The ordinals of a source that a unit covers.

    Attributes:
        source: URL or name of the shard or caption list.
        start: first ordinal in the source.
        stop: ordinal after the last.
        final: whether the source ends at `stop`.
        source_digest: SHA-256 of the rows read, or of the shard's name and size.
        tear: where the shard was torn, in its final unit; None if it was whole.
        parent: the final unit of the torn shard that this unit continues.
    """

    source: str
    start: int
    stop: int
    final: bool
    source_digest: str
    tear: Tear | None = None
    parent: str | None = None

    def range_values(self) -> dict[str, Any]:
        """The values of the range alone, by field."""
        return {each.name: getattr(self, each.name) for each in fields(SourceRange)}


@dataclass(frozen=True, kw_only=True)
class UnitManifest(SourceRange):
    """One unit of work. Rows read = rows written + rows rejected, always.

    Attributes:
        unit: its name, unique in the table and the stem of its file.
        settings: digest of the table's identity: everything that determines the rows.
        environment: device class, dtype and threads; within one environment the rows are bit-identical.
        rows_read: rows of the source in [start, stop).
        rows_written: rows in the data file.
        rejections: the rejected rows.
    """

    unit: str
    settings: str
    environment: dict[str, Any]
    rows_read: int
    rows_written: int
    rejections: tuple[Rejection, ...] = ()

    def __post_init__(self) -> None:
        if self.rows_read != self.rows_written + len(self.rejections):
            raise ValueError(
                f"unit {self.unit}: {self.rows_read} rows read, but {self.rows_written} written and "
                f"{len(self.rejections)} rejected"
            )

    def rejected(self) -> dict[str, int]:
        """The number of rejected rows by reason."""
        return total_rejected([self])

    def ordinals(self) -> list[int]:
        """The ordinals of the rows in the data file, in their order.

        Rows of LATENTS rejected as `not_finite` all carry the unit's first ordinal. The result is then not
        the true ordinals, but still rising numbers within the unit, and each row keeps its own when others
        are removed.
        """
        rejected = {rejection.ordinal for rejection in self.rejections}
        free = (ordinal for ordinal in range(self.start, self.stop) if ordinal not in rejected)
        return list(itertools.islice(free, self.rows_written))

    def to_json(self) -> str:
        """The manifest as canonical JSON: equal manifests give equal text."""
        values = asdict(self)
        # Names of revised files are hashes of this text, so its form must never change.
        for name in ("tear", "parent"):
            if values[name] is None:
                del values[name]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitManifest:
        """A manifest from its JSON."""
        values = json.loads(text)
        rejections = tuple(Rejection(**rejection) for rejection in values.pop("rejections"))
        tear = Tear(**values.pop("tear")) if "tear" in values else None
        return cls(**values, tear=tear, rejections=rejections)


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """One row of the table of units; see `pipelines.tables.schemas.UNITS`."""

    unit: str
    source: str
    account: str
    rows_read: int
    rows_written: int
    rows_rejected: int
    bytes: int
    sha256: str
    seconds: float | None
    made_by: str | None


def to_parquet(rows: pa.Table, manifest: UnitManifest) -> bytes:
    """The data file of a unit: its rows as Parquet with the manifest in the footer."""
    if rows.num_rows != manifest.rows_written:
        raise ValueError(f"unit {manifest.unit} has {rows.num_rows} rows, not {manifest.rows_written}")
    rows = rows.replace_schema_metadata({_KEY: manifest.to_json().encode()})
    buffer = io.BytesIO()
    compression = {name: _COMPRESSION.get(name, "none") for name in rows.schema.names}
    # Dictionaries and statistics of latents cost a pass over them and tell a reader nothing.
    pq.write_table(
        rows,
        buffer,
        use_dictionary=False,
        write_statistics=["id"],
        write_page_checksum=True,
        compression=compression,
    )
    return buffer.getvalue()


def read_manifest(data: bytes) -> UnitManifest:
    """The manifest in a data file's footer.

    Raises:
        ValueError: if the file is incomplete, or was not written by a unit of work.
    """
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from None
    if _KEY not in metadata:
        raise ValueError("a Parquet file without a manifest in its footer")
    return UnitManifest.from_json(metadata[_KEY])


def covers_source(manifests: Iterable[UnitManifest]) -> bool:
    """Whether the units of one source lead without a gap from its first row to a final one."""
    position, final = 0, False
    for manifest in in_order(manifests):
        if manifest.start != position:
            return False
        position, final = manifest.stop, manifest.final
    return final


def in_order(manifests: Iterable[UnitManifest]) -> list[UnitManifest]:
    """The units of one source in the order of their rows."""
    return sorted(manifests, key=lambda manifest: (manifest.start, manifest.stop))


def total_rejected(manifests: Iterable[UnitManifest]) -> dict[str, int]:
    """The number of rejected rows by reason, over several units."""
    reasons = (rejection.reason for manifest in manifests for rejection in manifest.rejections)
    return dict(sorted(Counter(reasons).items()))
