"""What a data file says of itself: where its rows came from, how many there were, and which were set aside.

The account travels in the Parquet footer, so a committed file is enough to restore everything else. It holds
nothing that differs between two runs of the same work: no times, no host names.
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejection

_KEY = b"snapfusion.account"
# Latents and PNGs do not shrink; captions and padded token ids do, tenfold.
_COMPRESSION = {"caption": "zstd", "token_ids": "zstd"}


@dataclass(frozen=True, kw_only=True)
class UnitManifest:
    """One unit of work. Rows read = rows written + rows rejected, always.

    Attributes:
        unit: its name, unique in the table and the stem of its file.
        source: URL or name of the shard or caption list.
        start: first ordinal in the source.
        stop: ordinal after the last.
        final: whether the source ends at `stop`.
        source_digest: SHA-256 of what was read, or of the shard's name and size.
        settings: digest of the table's identity: everything that determines the rows.
        environment: device class, dtype and threads; the rows' bits are promised within them.
        rows_read: rows of the source in [start, stop).
        rows_written: rows in the data file.
        rejections: the rows set aside.
    """

    unit: str
    source: str
    start: int
    stop: int
    final: bool
    source_digest: str
    settings: str
    environment: dict[str, Any]
    rows_read: int
    rows_written: int
    rejections: tuple[Rejection, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.rows_read != self.rows_written + len(self.rejections):
            raise ValueError(
                f"unit {self.unit}: {self.rows_read} rows read, but {self.rows_written} written and "
                f"{len(self.rejections)} rejected"
            )

    def rejected(self) -> dict[str, int]:
        """Rows set aside, by reason."""
        return dict(sorted(Counter(rejection.reason for rejection in self.rejections).items()))

    def ordinals(self) -> list[int]:
        """The ordinals of the rows in the data file, in their order.

        Where a network put out NaN its rejections of LATENTS know only the unit's first ordinal; then these
        are still rising numbers of the unit, and each row keeps its own when others are taken out.
        """
        set_aside = {rejection.ordinal for rejection in self.rejections}
        free = (place for place in range(self.start, self.stop) if place not in set_aside)
        return list(itertools.islice(free, self.rows_written))

    def to_json(self) -> str:
        """The account in its one spelling."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> UnitManifest:
        """An account from its spelling."""
        values = json.loads(text)
        rejections = tuple(Rejection(**rejection) for rejection in values.pop("rejections"))
        return cls(**values, rejections=rejections)


def to_parquet(rows: pa.Table, account: UnitManifest) -> bytes:
    """The data file of a unit: rows in Parquet, the account in the footer."""
    if rows.num_rows != account.rows_written:
        raise ValueError(f"unit {account.unit}: {rows.num_rows} rows, accounted {account.rows_written}")
    named = rows.replace_schema_metadata({_KEY: account.to_json().encode()})
    buffer = io.BytesIO()
    compression = {name: _COMPRESSION.get(name, "none") for name in rows.schema.names}
    # Dictionaries and statistics of latents cost a pass over them and tell a reader nothing.
    pq.write_table(named, buffer, use_dictionary=False, write_statistics=["id"], compression=compression)
    return buffer.getvalue()


def read_manifest(data: bytes) -> UnitManifest:
    """The account in a data file's footer.

    Raises:
        ValueError: if the file is not whole, or was not written by a unit of work.
    """
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from None
    if _KEY not in metadata:
        raise ValueError("a Parquet file without an account in its footer")
    return UnitManifest.from_json(metadata[_KEY])


def covers_source(accounts: Iterable[UnitManifest]) -> bool:
    """Whether units of one source lead without a gap from its first row to the final one."""
    position = 0
    for account in sorted(accounts, key=lambda account: account.start):
        if account.start != position:
            return False
        position = account.stop
        if account.final:
            return True
    return False


def total_rejected(accounts: Sequence[UnitManifest]) -> dict[str, int]:
    """Rows set aside by reason, over several units."""
    total: Counter[str] = Counter()
    for account in accounts:
        total.update(account.rejected())
    return dict(sorted(total.items()))
