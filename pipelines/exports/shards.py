"""Writes the shards of an export: each a tar of samples, and its counts beside it when it is whole."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Final, cast

from pipelines.deletion.table_matches import matching_rows
from pipelines.exports.samples import Sample, SampleEncoder
from pipelines.exports.settings import ExportSettings
from pipelines.sources.stats import stats_url
from pipelines.stages.device import DTYPES, environment_of, prepare
from pipelines.storage.objects import list_names, replace_object
from pipelines.storage.streams import ObjectWriter, write_stream
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.table import open_table
from pipelines.tables.unit_files import UnitFile
from snapfusion.models.load import load

_BLOCK_BYTES: Final = 1 << 16
_STATS_ENDING: Final = "_stats.json"


@dataclass(frozen=True, kw_only=True)
class ShardPart:
    """Rows [start, stop) of a unit's file."""

    file: UnitFile
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """A shard to write: its number, and the rows of the table that it covers."""

    number: int
    parts: tuple[ShardPart, ...]

    @property
    def name(self) -> str:
        """The name of the tar without its ending."""
        return shard_name(self.number)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(part.stop - part.start for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """What `<shard>_stats.json` holds, under the names of img2dataset; no times, so that it can be repeated.

    Attributes:
        count: rows of the table that the shard covers.
        successes: samples in the tar.
        failed_to_download: 0; there for readers of img2dataset's files.
        failed_to_resize: likewise.
        status_dict: rows by what became of them: "success", or "forgotten" for one on the deletion list.
        bytes: of the tar.
        sha256: of the tar.
        environment: what the bits of the encoded captions depend on.
    """

    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    status_dict: dict[str, int]
    bytes: int
    sha256: str
    environment: dict[str, Any]


def shard_name(number: int) -> str:
    """The name of a shard without its ending."""
    return f"{number:05d}"


def plan_shards(units: Iterable[UnitFile], *, rows_per_shard: int) -> Iterator[ShardPlan]:
    """The shards of a table: `rows_per_shard` rows each in the table's order, fewer in the last."""
    parts: list[ShardPart] = []
    number, rows = 0, 0
    for file in units:
        start = 0
        while start < file.rows:
            stop = min(file.rows, start + rows_per_shard - rows)
            parts.append(ShardPart(file=file, start=start, stop=stop))
            rows, start = rows + stop - start, stop
            if rows == rows_per_shard:
                yield ShardPlan(number=number, parts=tuple(parts))
                parts, number, rows = [], number + 1, 0
    if parts:
        yield ShardPlan(number=number, parts=tuple(parts))


def finished_shards(folder: str) -> set[str]:
    """The names of the shards in a folder that are whole."""
    names = set(list_names(folder))
    tars = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    return {name for name in tars if f"{name}{_STATS_ENDING}" in names}


class WriteShard:
    """Turns a `ShardPlan` into a tar and its `ShardCounts`, one unit of the table in memory at a time.

    Args:
        table: URL of the table.
        version: of the table that is read.
        folder: URL of the export.
        model: a source that `snapfusion.models.load` accepts.
        settings: of the export.
        deleted: the deletion list; rows on it are left out.
    """

    def __init__(
        self,
        *,
        table: str,
        version: int,
        folder: str,
        model: str,
        settings: ExportSettings,
        deleted: DeletionList,
    ) -> None:
        device = prepare(settings.device)
        self.table = open_table(table, version=version)
        self.folder = folder
        self.environment = environment_of(settings.device)
        bundle = load(model, device=device, dtype=DTYPES[settings.device.dtype])
        self.encoder = SampleEncoder(bundle, settings)
        self.deleted = deleted.read()

    def __call__(self, plan: ShardPlan) -> ShardCounts:
        """Write the tar, then its counts: a tar without them is written again by the next run."""
        url = f"{self.folder}/{plan.name}.tar"
        with write_stream(url) as file:
            written = write_tar(file, self._samples(plan), prefix=plan.name)
        left_out = plan.rows - written
        counts = ShardCounts(
            count=plan.rows,
            successes=written,
            failed_to_download=0,
            failed_to_resize=0,
            status_dict={"success": written, **({"forgotten": left_out} if left_out else {})},
            bytes=file.size,
            sha256=file.sha256(),
            environment=self.environment,
        )
        text = json.dumps(asdict(counts), indent=1, sort_keys=True)
        replace_object(stats_url(url), text.encode())
        return counts

    def _samples(self, plan: ShardPlan) -> Iterator[Sample | None]:
        """The sample of each row; None for a row on the deletion list."""
        for part in plan.parts:
            rows = self.table.read_unit(part.file).slice(part.start, part.stop - part.start)
            deleted = set(matching_rows(self.table, rows, self.deleted) if self.deleted else ())
            # Encoded in any case: bits depend on a batch, and so not on what was deleted.
            for index, sample in enumerate(self.encoder.samples(rows)):
                yield None if index in deleted else sample


def write_tar(file: ObjectWriter, samples: Iterable[Sample | None], *, prefix: str) -> int:
    """Write samples as a tar that depends on nothing else; returns their number.

    Keys are the prefix and the sample's index among all, with those that are None: they have no dot, at which
    loaders divide a name into key and extension.
    """
    written = 0
    # A stream is only written to, and never read or sought.
    stream = cast("IO[bytes]", file)
    with tarfile.open(fileobj=stream, mode="w|", bufsize=_BLOCK_BYTES, format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in enumerate(samples):
            for ending, content in (sample or {}).items():
                member = tarfile.TarInfo(f"{prefix}{index:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            written += sample is not None
    return written
