"""Reads img2dataset shards: a tar of images, captions and metadata with a Parquet sidecar, or Parquet alone.

In a tar, a sample is a run of members whose names agree up to the first dot: `000000012.jpg`, `.json`,
`.txt`. The tar is read forward once and never extracted. All irregularities are resolved here:

- the caption is the first non-empty one of the .txt, the .json and the sidecar;
- the metadata are the sidecar's, overridden by the .json; both are optional;
- a .json that does not parse rejects the sample, unless the sidecar lists it: a sample without metadata makes
  no claim, but one with unreadable metadata may have been marked unsafe; for the same reason a sample without
  .json is rejected where the sidecar cannot be read, or has not exactly one row for it;
- the first of several images counts, and members of unknown extension are skipped unread;
- a key that repeats, adjacent or later, begins a second sample, which is rejected;
- a sample cut by a tear is kept if image, caption and metadata had all arrived.

In Parquet (`output_format=parquet`) rows keep their positions, failed ones included; a corrupt row group
costs its rows from the corruption on.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError, check_range
from pipelines.sources.layouts import text_of
from pipelines.sources.listing import SourceFile, list_files
from pipelines.sources.parquet import CorruptParquetError, open_parquet
from pipelines.sources.parquet_images import ImageRow, has_images, read_image_rows
from pipelines.sources.settings import ShardSettings
from pipelines.sources.sidecar import Sidecar, failure_of, read_sidecar
from pipelines.sources.tar import Member, TornShardError, is_unsafe, read_members
from pipelines.sources.text import clean_caption
from pipelines.storage.objects import open_object

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_CONCURRENT_FOOTERS = 16
_FOOTER_BYTES = 1 << 16

Shard: TypeAlias = SourceFile
"""One tar, or one Parquet file with a column of images."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its caption.

    Attributes:
        id: `<shard name>/<key>`.
        ordinal: position in the shard, from 0.
        key: the members' common name, or the row's key.
        image: the encoded image, not yet decoded.
        caption: one line, not empty.
        metadata: the values of .json and sidecar, under their own names.
        source_id: the image's origin URL if known, else the id; deletion requests refer to it.
    """

    id: str
    ordinal: int
    key: str
    image: bytes
    caption: str
    metadata: dict[str, Any]
    source_id: str


def list_shards(url: str) -> list[Shard]:
    """The shards at `url`, sorted by name: one file, a glob, or a folder.

    A `.parquet` beside a `.tar` of the same name is its sidecar; any other is a shard if its footer has a
    column of images.

    Raises:
        SourceError: if there is none, or `url` cannot be listed.
    """
    files = list_files(url, endings=(".tar", ".parquet"))
    tars = {file.name for file in files if _is_tar(file)}
    candidates = [file for file in files if file.name not in tars]
    try:
        # Each footer is a round trip to the store.
        with ThreadPoolExecutor(_CONCURRENT_FOOTERS) as pool:
            verdicts = pool.map(has_images, [file.url for file in candidates])
            with_images = {file.name for file, verdict in zip(candidates, verdicts, strict=True) if verdict}
    except OSError as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error
    shards = [file for file in files if _is_tar(file) or file.name in with_images]
    if not shards:
        lists = f"; the {len(candidates)} Parquet files there have no images: download URL lists first"
        raise SourceError(
            f"no shards at {url}: give a .tar, a folder of them, a glob such as 'folder/*.tar', or Parquet "
            f"files with a column of images{lists if candidates else ''}"
        )
    return shards


def _is_tar(shard: Shard) -> bool:
    return shard.url.endswith(".tar")


def count_rows(shard: Shard) -> int | None:
    """The rows of a shard by its Parquet file's footer; None without one. An estimate, for progress only."""
    try:
        with open_object(_parquet_url(shard), ahead=_FOOTER_BYTES) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException):
        return None


def sidecar_failures(shard: Shard) -> list[Rejected]:
    """Why rows that only a tar's sidecar lists have no image; the tar is not read. Empty for Parquet."""
    return read_sidecar(_parquet_url(shard))[0].failures() if _is_tar(shard) else []


def metadata_columns(shard: Shard, settings: ShardSettings) -> frozenset[str]:
    """The names of a shard's metadata: the columns of its Parquet file and the keys of its first sample."""
    names: set[str] = set()
    unreadable = contextlib.suppress(CorruptParquetError, FileNotFoundError)
    with unreadable, open_parquet(_parquet_url(shard)) as rows:
        names.update(rows.schema.names)
    first = next((row for row in read_shard(shard, settings) if isinstance(row, Sample)), None)
    return frozenset(names.union(first.metadata if first else ()))


def read_shard(
    shard: Shard, settings: ShardSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Sample | Rejection]:
    """Rows `start` <= ordinal < `stop` of a shard, in order, each as a sample or a rejection.

    Ordinals count the samples in the tar and then, in the sidecar's order, its rows that did not arrive:
    failed downloads, and what followed a tear. Without a sidecar one row stands for everything after a tear.
    Members before `start` are skipped; at most one sample is held in memory. In Parquet, ordinals count all
    rows; row groups before `start` are skipped, and memory holds 8 rows and one page of each column.

    Raises:
        ValueError: if the range is invalid.
        OSError: if the store fails. That is no fault of a row: the unit should be retried.
    """
    check_range(start, stop)
    read = _read_tar if _is_tar(shard) else _read_parquet
    for row in read(shard, settings, start=start):
        if stop is not None and row.ordinal >= stop:
            return
        if row.ordinal >= start:
            yield _check(row, shard, settings)


def _check(row: ImageRow, shard: Shard, settings: ShardSettings) -> Sample | Rejection:
    name = printable(f"{shard.name}/{row.key}")
    try:
        if row.fault is not None:
            raise row.fault
        if row.image is None:
            raise Rejected("missing_image", "a success by the row's account")
        return Sample(
            id=name,
            ordinal=row.ordinal,
            key=printable(row.key),
            image=row.image,
            caption=_first_caption(row.captions, max_chars=settings.max_caption_chars),
            metadata=row.metadata,
            source_id=printable(text_of(row.metadata, "url") or "") or name,
        )
    except Rejected as rejected:
        return rejected.record(id=name, source=shard.name, ordinal=row.ordinal)


def _read_tar(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[ImageRow]:
    sidecar, fault = read_sidecar(_parquet_url(shard))
    arrived: set[str] = set()
    tear: TornShardError | None = None
    ordinal = 0
    try:
        for group in _groups(shard, settings, start=start):
            if group.key in arrived:
                group.reject(_repeated(group.key))
            arrived.add(group.key)
            yield group.row(sidecar)
            ordinal = group.ordinal + 1
    except TornShardError as error:
        tear = error
    absent = list(sidecar.absent(arrived, tear=tear))
    if tear is not None and not sidecar:
        absent.append((".tar", Rejected("torn_shard", f"after {ordinal} samples: {tear}")))
    if fault is not None:
        absent.append((".parquet", fault))
    for position, (key, rejected) in enumerate(absent, start=ordinal):
        yield ImageRow(ordinal=position, key=key, fault=rejected)


def _read_parquet(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[ImageRow]:
    arrived: set[str] = set()
    try:
        for row in read_image_rows(shard.url, start=start, max_image_bytes=settings.max_image_bytes):
            repeated = _repeated(row.key) if row.key in arrived else None
            arrived.add(row.key)
            yield replace(row, fault=repeated or row.fault or failure_of(row.metadata))
    except CorruptParquetError as error:
        yield ImageRow(ordinal=0, key=".parquet", fault=Rejected("torn_shard", str(error)))


def _repeated(key: str) -> Rejected:
    return Rejected("duplicate_key", f"{key} came before")


def _parquet_url(shard: Shard) -> str:
    """The sidecar of a tar, or the shard itself."""
    return f"{shard.url.removesuffix('.tar')}.parquet" if _is_tar(shard) else shard.url


@dataclass(kw_only=True)
class _Group:
    """The members of one key, while they are read."""

    key: str
    ordinal: int
    is_in_range: bool
    extensions: list[str] = field(default_factory=list)
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    fault: Rejected | None = None

    def reject(self, fault: Rejected) -> None:
        """Record a fault; the first one counts."""
        self.fault = self.fault or fault

    def add(self, member: Member, extension: str, settings: ShardSettings) -> None:
        """Check a member, and read it if its extension is known and the group is in range."""
        self.extensions.append(extension)
        try:
            member.check()
            if not self.is_in_range or self.fault:
                return
            if extension in IMAGE_EXTENSIONS and self.image is None:
                self.image = member.read(max_bytes=settings.max_image_bytes)
            elif extension in ("txt", "json"):
                self.texts[extension] = member.read(max_bytes=settings.max_text_bytes)
        except Rejected as fault:
            self.reject(fault)

    def row(self, sidecar: Sidecar) -> ImageRow:
        """The sample, with the metadata of the sidecar and of its own .json."""
        listed = sidecar.metadata(self.key)
        metadata = listed
        try:
            if self.image is None:
                raise Rejected("missing_image", f"extensions: {', '.join(sorted(self.extensions))}")
            if "json" not in self.texts and (mismatch := sidecar.mismatch(self.key)):
                raise mismatch
            metadata = listed | _parse_metadata(self.texts.get("json"), is_listed=bool(listed))
        except Rejected as fault:
            self.reject(fault)
        return ImageRow(
            ordinal=self.ordinal,
            key=self.key,
            image=self.image,
            captions=(self.texts.get("txt"), metadata.get("caption"), listed.get("caption")),
            metadata=metadata,
            fault=self.fault,
        )

    def survives(self, tear: TornShardError) -> bool:
        """Whether image, caption and metadata had all arrived before the tear."""
        arrived = self.extensions[:-1] if tear.inside_member else self.extensions
        return {"txt", "json"} <= set(arrived) and not IMAGE_EXTENSIONS.isdisjoint(arrived)


def _groups(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[_Group]:
    group: _Group | None = None
    with open_object(shard.url) as file:
        try:
            for member in read_members(file):
                key, extension = _split(member.name)
                if not key:
                    continue
                # A repeated extension begins a second sample of the same key.
                if group is None or key != group.key or extension in group.extensions:
                    if group is not None:
                        yield group
                    ordinal = 0 if group is None else group.ordinal + 1
                    group = _Group(key=key, ordinal=ordinal, is_in_range=ordinal >= start)
                group.add(member, extension, settings)
        except TornShardError as tear:
            if group is not None and group.survives(tear):
                yield group
            raise
        if group is not None:
            yield group


def _split(name: str) -> tuple[str, str]:
    """Key and extension; an empty key for names such as `README`, `.DS_Store` and `._00012.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".") if is_unsafe(name) else base.partition(".")
    if not stem or not dot:
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _parse_metadata(data: bytes | None, *, is_listed: bool) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        values = json.loads(data)
        fault = f"a JSON {type(values).__name__}, not an object"
    except (ValueError, RecursionError) as error:
        values, fault = None, str(error)
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if value is not None}
    if is_listed:
        return {}
    raise Rejected("bad_metadata", fault)


def _first_caption(candidates: Sequence[object], *, max_chars: int) -> str:
    rejected = Rejected("missing_caption")
    for candidate in candidates:
        if not isinstance(candidate, str | bytes):
            continue
        try:
            return clean_caption(candidate, max_chars=max_chars)
        except Rejected as fault:
            if fault.reason != "empty_caption":
                raise
            rejected = fault
    raise rejected
