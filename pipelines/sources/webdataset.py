"""img2dataset shards: a tar of pictures, captions and metadata with a Parquet sidecar beside it, or Parquet.

In a tar, a sample is a run of members whose names agree up to the first dot: `000000012.jpg`, `.json`,
`.txt`. The tar is read forward once and never extracted. What is odd about a sample is decided here, in one
place:

- its caption is the first that is not empty of the .txt, the .json and the sidecar;
- its metadata are the sidecar's, overruled by the .json; neither need be there;
- a .json that is there but does not parse rejects the sample, unless the sidecar knows it: a sample without
  metadata makes no claim, but one whose claims are unreadable may have been marked unsafe;
- of several pictures the first counts, and members of unknown extension are passed over unread;
- a key that comes again, next to its first sample or later, is a second sample and is rejected;
- a sample that a tear cuts is kept if picture, caption and metadata had all arrived.

In Parquet (`output_format=parquet`) each row stands in its place, failed ones too; a row group that is
corrupt costs its rows from there on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rejections import Rejected, Rejection, printable
from pipelines.sources import SourceError
from pipelines.sources.layouts import text_of
from pipelines.sources.listing import list_files
from pipelines.sources.parquet import CorruptParquetError, open_parquet
from pipelines.sources.pictures import ImageRow, has_images, read_image_rows
from pipelines.sources.settings import ShardSettings
from pipelines.sources.sidecar import FAILURES, Sidecar, SidecarError, read_sidecar
from pipelines.sources.tar import Member, TornShardError, is_unsafe, read_members
from pipelines.sources.text import clean_caption
from pipelines.storage.objects import open_object

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_READ_AHEAD_BYTES = 8 << 20
_FOOTERS_AT_ONCE = 16
_FOOTER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar, or one Parquet file with a column of pictures.

    Attributes:
        url: where it lies; a local path or an object-store URL.
        name: its path below what was listed, without its ending; the first part of its samples' ids.
        size: bytes.
    """

    url: str
    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture and its caption.

    Attributes:
        id: `<shard name>/<key>`.
        ordinal: position in the shard, from 0.
        key: the members' common name, or the row's.
        image: the encoded picture, not yet looked at.
        caption: one line, not empty.
        metadata: what .json and sidecar know; names as they are spelled there.
        source_id: the picture's origin URL if known, else the id; deletions on request go by it.
    """

    id: str
    ordinal: int
    key: str
    image: bytes
    caption: str
    metadata: dict[str, Any]
    source_id: str


def list_shards(url: str) -> list[Shard]:
    """The shards that `url` means, sorted by name: one file, a glob, or a folder.

    A `.parquet` beside a `.tar` of its name is that one's sidecar; another is a shard if it has a column of
    pictures, which its footer says.

    Raises:
        SourceError: if there is none, or the place cannot be listed.
    """
    places = list_files(url, endings=(".tar", ".parquet"))
    tars = {place.stem for place in places if _is_tar(place.url)}
    unclear = [place for place in places if place.stem not in tars]
    try:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            answers = pool.map(lambda place: has_images(place.url), unclear)
            pictures = {place.stem for place, yes in zip(unclear, answers, strict=True) if yes}
    except OSError as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error
    shards = [place for place in places if _is_tar(place.url) or place.stem in pictures]
    if not shards:
        lists = f"; the {len(unclear)} Parquet files there hold no pictures: URL lists are downloaded first"
        raise SourceError(
            f"no shards at {url}: give a .tar, a folder of them, or a glob such as 'folder/*.tar'; Parquet "
            f"with a column of pictures will do too{lists if unclear else ''}"
        )
    return [Shard(url=place.url, name=place.stem, size=place.size) for place in shards]


def _is_tar(url: str) -> bool:
    return url.endswith(".tar")


def count_rows(shard: Shard) -> int | None:
    """Rows of a shard by its Parquet file's footer; None without one. An estimate, for progress alone."""
    try:
        with open_object(_parquet_url(shard), ahead=_FOOTER_BYTES) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException):
        return None


def sidecar_failures(shard: Shard) -> list[Rejected]:
    """What a tar's sidecar says of rows that have no picture; the tar is not read. None for Parquet."""
    if not _is_tar(shard.url):
        return []
    sidecar, _ = _sidecar_of(shard)
    return [Rejected(reason, detail) for reason, detail in sidecar.failed()]


def metadata_columns(shard: Shard, settings: ShardSettings) -> frozenset[str]:
    """The names under which a shard says something of its rows: its Parquet file's and its first sample's."""
    names: set[str] = set()
    unreadable = contextlib.suppress(CorruptParquetError, FileNotFoundError)
    with unreadable, open_parquet(_parquet_url(shard)) as rows:
        names.update(rows.schema.names)
    first = next((row for row in read_shard(shard, settings) if isinstance(row, Sample)), None)
    return frozenset(names.union(first.metadata if first else ()))


def read_shard(
    shard: Shard, settings: ShardSettings, *, start: int = 0, stop: int | None = None
) -> Iterator[Sample | Rejection]:
    """Rows `start` <= ordinal < `stop` of a shard, in order, each as a sample or as a rejection.

    Ordinals count the samples in the tar and then, in the sidecar's order, its rows that did not arrive:
    failed downloads, and what lay behind a tear. Without a sidecar one row stands for all that a tear took.
    Members before `start` are passed over; at most one sample is held in memory. In Parquet, ordinals count
    the rows as they stand; row groups before `start` are passed over, and memory holds 8 rows and
    a page of each column.

    Raises:
        ValueError: if the range is not one.
        OSError: if the store does not answer: that is no fault of a row, and the unit should be tried again.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start {start} and stop {stop} given; 0 <= start <= stop is accepted")
    rows = _rows_of_tar if _is_tar(shard.url) else _rows_of_parquet
    for row in rows(shard, settings, start=start):
        if stop is not None and row.ordinal >= stop:
            return
        if row.ordinal >= start:
            yield row


def _rows_of_tar(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[Sample | Rejection]:
    sidecar, fault = _sidecar_of(shard)
    arrived: set[str] = set()
    tear: TornShardError | None = None
    ordinal = 0
    try:
        for group in _groups(shard, settings, start=start):
            if group.key in arrived:
                group.reject(Rejected("duplicate_key", f"{group.key} came before"))
            arrived.add(group.key)
            yield _judge(group, sidecar, shard=shard, settings=settings)
            ordinal = group.ordinal + 1
    except TornShardError as error:
        tear = error
    lost = list(_lost(sidecar, arrived, tear=tear, rows=ordinal))
    if fault is not None:
        lost.append((".parquet", fault))
    for position, (key, verdict) in enumerate(lost, start=ordinal):
        yield verdict.record(id=_id(shard, key), source=shard.name, ordinal=position)


def _rows_of_parquet(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[Sample | Rejection]:
    arrived: set[str] = set()
    try:
        for row in read_image_rows(shard.url, start=start, max_image_bytes=settings.max_image_bytes):
            again = row.key in arrived
            arrived.add(row.key)
            if row.ordinal >= start:
                yield _judge_row(row, shard=shard, settings=settings, again=again)
    except CorruptParquetError as error:
        verdict = Rejected("torn_shard", str(error))
        yield verdict.record(id=_id(shard, ".parquet"), source=shard.name, ordinal=0)


def _judge_row(row: ImageRow, *, shard: Shard, settings: ShardSettings, again: bool) -> Sample | Rejection:
    name = _id(shard, row.key)
    status = row.metadata.get("status") or "success"
    try:
        if again:
            raise Rejected("duplicate_key", f"{row.key} came before")
        if row.fault is not None:
            raise row.fault
        if status != "success":
            detail = row.metadata.get("error_message") or status
            raise Rejected(FAILURES.get(status, "missing_sample"), str(detail))
        if row.image is None:
            raise Rejected("missing_image", "a success by the row's account")
        return Sample(
            id=name,
            ordinal=row.ordinal,
            key=printable(row.key),
            image=row.image,
            caption=_first_caption((row.txt, row.caption), max_chars=settings.max_caption_chars),
            metadata=row.metadata,
            source_id=_source_id(row.metadata) or name,
        )
    except Rejected as verdict:
        return verdict.record(id=name, source=shard.name, ordinal=row.ordinal)


def _sidecar_of(shard: Shard) -> tuple[Sidecar, Rejected | None]:
    try:
        found = read_sidecar(_parquet_url(shard))
    except SidecarError as error:
        return Sidecar(), Rejected("bad_sidecar", str(error))
    return Sidecar() if found is None else found, None


def _parquet_url(shard: Shard) -> str:
    """The sidecar of a tar, or the shard itself."""
    return f"{shard.url.removesuffix('.tar')}.parquet" if _is_tar(shard.url) else shard.url


def _lost(
    sidecar: Sidecar, arrived: set[str], *, tear: TornShardError | None, rows: int
) -> Iterator[tuple[str, Rejected]]:
    for key, reason, detail in sidecar.absent(arrived, torn=tear is not None):
        yield key, Rejected(reason, f"{tear}; {detail}" if reason == "torn_shard" else detail)
    if tear is not None and not sidecar:
        yield ".tar", Rejected("torn_shard", f"after {rows} samples: {tear}")


@dataclass(kw_only=True)
class _Group:
    """Members of one key while they arrive."""

    key: str
    ordinal: int
    wanted: bool
    extensions: list[str] = field(default_factory=list)
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    fault: Rejected | None = None

    def reject(self, fault: Rejected) -> None:
        """Keep the first fault that is found."""
        self.fault = self.fault or fault

    def add(self, member: Member, extension: str, settings: ShardSettings) -> None:
        """Check a member, and read it if it is known and wanted."""
        self.extensions.append(extension)
        try:
            member.check()
            if not self.wanted or self.fault:
                return
            if extension in IMAGE_EXTENSIONS and self.image is None:
                self.image = member.read(max_bytes=settings.max_image_bytes)
            elif extension in ("txt", "json"):
                self.texts[extension] = member.read(max_bytes=settings.max_text_bytes)
        except Rejected as fault:
            self.reject(fault)

    def survives(self, tear: TornShardError) -> bool:
        """Whether picture, caption and metadata had all arrived before the tear."""
        arrived = self.extensions[:-1] if tear.inside_member else self.extensions
        return {"txt", "json"} <= set(arrived) and not IMAGE_EXTENSIONS.isdisjoint(arrived)


def _groups(shard: Shard, settings: ShardSettings, *, start: int) -> Iterator[_Group]:
    group: _Group | None = None
    with open_object(shard.url, ahead=_READ_AHEAD_BYTES) as file:
        try:
            for member in read_members(file):
                key, extension = _split(member.name)
                if not key:
                    continue
                if group is None or key != group.key or extension in group.extensions:
                    if group is not None:
                        yield group
                    ordinal = 0 if group is None else group.ordinal + 1
                    group = _Group(key=key, ordinal=ordinal, wanted=ordinal >= start)
                group.add(member, extension, settings)
        except TornShardError as tear:
            if group is not None and group.survives(tear):
                yield group
            raise
        if group is not None:
            yield group


def _split(name: str) -> tuple[str, str]:
    """Key and extension; no key for names such as `README`, `.DS_Store` and `._00012.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".") if is_unsafe(name) else base.partition(".")
    if not stem or not dot:
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _judge(group: _Group, sidecar: Sidecar, *, shard: Shard, settings: ShardSettings) -> Sample | Rejection:
    name = _id(shard, group.key)
    known = sidecar.metadata(group.key)
    try:
        if group.fault is not None:
            raise group.fault
        if group.image is None:
            raise Rejected("missing_image", f"extensions: {', '.join(sorted(group.extensions))}")
        metadata = known | _metadata(group.texts.get("json"), replaceable=bool(known))
        return Sample(
            id=name,
            ordinal=group.ordinal,
            key=printable(group.key),
            image=group.image,
            caption=_first_caption(
                (group.texts.get("txt"), metadata.get("caption"), known.get("caption")),
                max_chars=settings.max_caption_chars,
            ),
            metadata=metadata,
            source_id=_source_id(metadata) or name,
        )
    except Rejected as verdict:
        return verdict.record(id=name, source=shard.name, ordinal=group.ordinal)


def _id(shard: Shard, key: str) -> str:
    return printable(f"{shard.name}/{key}")


def _metadata(data: bytes | None, *, replaceable: bool) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        values, fault = None, str(error)
    else:
        fault = f"a JSON {type(values).__name__}, not an object"
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if value is not None}
    if replaceable:
        return {}
    raise Rejected("bad_metadata", fault)


def _first_caption(candidates: Sequence[object], *, max_chars: int) -> str:
    verdict = Rejected("missing_caption")
    for candidate in candidates:
        if not isinstance(candidate, str | bytes):
            continue
        try:
            return clean_caption(candidate, max_chars=max_chars)
        except Rejected as fault:
            if fault.reason != "empty_caption":
                raise
            verdict = fault
    raise verdict


def _source_id(metadata: dict[str, Any]) -> str:
    return printable(text_of(metadata, "url") or "")
