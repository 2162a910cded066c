"""Describes what to read of a shard: all of it, what is not committed, or what follows an earlier tear."""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.settings import ShardSettings
from pipelines.sources.tar_samples import OnTear
from pipelines.sources.tears import Tear, prefix_digest
from pipelines.sources.webdataset import Sample, Shard, read_shard
from pipelines.tables.units import Unit


@dataclass(frozen=True, kw_only=True)
class TornUnit:
    """The final unit of a shard that was torn when it was read.

    Attributes:
        name: of the unit.
        stop: the ordinal after its last.
        tear: where the shard was torn.
        failed: ids of the rows that the unit's source rejects without an image, as the sidecar lists them.
    """

    name: str
    stop: int
    tear: Tear
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """A shard to read, of which some units may be committed already.

    Attributes:
        shard: the tar or Parquet file.
        source: name of its units: `<name of the source>/<name of the shard>`.
        committed: (start, stop) of the committed units.
        parent: the torn unit after which the shard is read on; its ordinals follow those of that unit.
    """

    shard: Shard
    source: str
    committed: tuple[tuple[int, int], ...]
    parent: TornUnit | None = None

    @property
    def start(self) -> int:
        """The first ordinal that this reading of the shard gives."""
        return self.parent.stop if self.parent else 0

    @property
    def is_begun(self) -> bool:
        """Whether a unit of this reading is committed."""
        return any(stop > self.start for _, stop in self.committed)

    @property
    def prefix(self) -> str:
        """The name of the source, first part of every row id."""
        return self.source.split("/", 1)[0]

    def read(self, settings: ShardSettings, *, on_tear: OnTear) -> Iterator[Sample | Rejection]:
        """The rows that no committed unit covers, as of `read_shard`.

        Raises:
            OSError: if the store fails.
        """
        rows = read_shard(self.shard, settings, on_tear=on_tear)
        if self.parent is not None:
            rows = self._read_on(self.parent, settings, on_tear)
        return (row for row in rows if not self._holds(row.ordinal))

    def _holds(self, ordinal: int) -> bool:
        return any(start <= ordinal < stop for start, stop in self.committed)

    def _read_on(
        self, parent: TornUnit, settings: ShardSettings, on_tear: OnTear
    ) -> Iterator[Sample | Rejection]:
        """The rows after a tear, once the shard is whole; one rejection if it is another shard."""
        tear = parent.tear
        if prefix_digest(self.shard.url, tear.bytes) != tear.sha256:
            on_tear(tear)  # so that the next change of the shard is compared again
            detail = f"its first {tear.bytes} bytes are not those that unit {parent.name} was read from"
            changed = Rejected("changed_shard", detail)
            yield changed.record(id=f"{self.shard.name}/.tar", source=self.shard.name, ordinal=parent.stop)
            return
        ordinals = itertools.count(parent.stop)
        for row in read_shard(self.shard, settings, start=tear.rows, on_tear=on_tear):
            # Those that the sidecar listed as failed were rejected with the parent.
            if isinstance(row, Sample) or f"{self.prefix}/{row.id}" not in parent.failed:
                yield replace(row, ordinal=next(ordinals))

    def unit(self, *, start: int, stop: int) -> Unit:
        """The unit of ordinals [start, stop), not known to be final; its name can be a file name."""
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", self.source.replace("/", "-"))
        if stem != self.source.replace("/", "-", 1):
            # The replacement may have made two names equal.
            stem = f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"
        return Unit(
            name=f"{stem}-{start:06d}-{stop:06d}",
            source=self.source,
            start=start,
            stop=stop,
            final=False,
            source_digest=shard_digest(self.shard),
            parent=self.parent.name if self.parent else None,
        )


def shard_digest(shard: Shard) -> str:
    """SHA-256 of a shard's name and size; reading every byte only to name the shard would cost too much."""
    return hashlib.sha256(f"{shard.name}\x1f{shard.size}".encode()).hexdigest()
