"""Reads the samples of a tar, and accounts for the rows that are not in it.

A sample is a run of members whose names agree up to the first dot: `000000012.jpg`, `.json`, `.txt`. The tar
is read forward once and never extracted. All irregularities are resolved here:

- the metadata are the sidecar's, overridden by the .json; both are optional;
- a .json that does not parse rejects the sample, unless the sidecar lists it: a sample without metadata makes
  no claim, but one with unreadable metadata may have been marked unsafe; for the same reason a sample without
  .json is rejected where the sidecar cannot be read, or has not exactly one row for it;
- the first of several images counts, and members of unknown extension are skipped unread;
- a key that repeats, adjacent or later, begins a second sample, which is rejected;
- a sample of more than 1,000 members is rejected;
- a sample cut by a tear is kept if image, caption and metadata had all arrived;
- rows that the sidecar lists, or without one the stats file counts, and that did not arrive are rejected.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from pipelines.rejections import Rejected
from pipelines.sources.listing import SourceFile
from pipelines.sources.parquet_images import ImageRow
from pipelines.sources.settings import ShardSettings
from pipelines.sources.sidecar import Sidecar, read_sidecar, sidecar_url
from pipelines.sources.stats import ShardStats
from pipelines.sources.tar import Member, TornShardError, is_unsafe, read_members
from pipelines.sources.tears import Tear, prefix_digest
from pipelines.storage.objects import open_object

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_MAX_MEMBERS: Final = 1000
_COUNTED: Final = "counted by the shard's stats file"

OnTear: TypeAlias = Callable[[Tear], None]
"""Receives where a shard is torn, before the rejections of the rows after it."""


def read_tar(
    shard: SourceFile, settings: ShardSettings, *, start: int, on_tear: OnTear | None
) -> Iterator[ImageRow]:
    """Every row in order: the samples, and then those that did not arrive; see `webdataset.read_shard`.

    Raises:
        OSError: if the store fails.
    """
    sidecar, fault = read_sidecar(sidecar_url(shard.url))
    arrived: set[str] = set()
    tear: TornShardError | None = None
    ordinal = offset = 0
    try:
        for group in _groups(shard, settings, start=start):
            offset = group.offset
            if group.key in arrived:
                group.reject(repeated_key(group.key))
            arrived.add(group.key)
            yield group.row(sidecar)
            ordinal = group.ordinal + 1
    except TornShardError as error:
        tear = error
    except (OSError, MemoryError):
        raise  # no fault of the shard
    except Exception as error:  # noqa: BLE001 - a shard may hold anything, and the others go on
        tear = TornShardError(f"{type(error).__name__}: {error}", offset=offset)
    if tear is not None and on_tear is not None:
        digest = prefix_digest(shard.url, tear.offset)
        on_tear(Tear(rows=ordinal, bytes=tear.offset, sha256=digest))
    if sidecar:
        absent = list(sidecar.absent(arrived, tear=tear))
    else:
        absent = list(_unlisted(ShardStats.read(shard.url), samples=ordinal, tear=tear))
    if fault is not None:
        absent.append((".parquet", fault))
    for position, (key, rejected) in enumerate(absent, start=ordinal):
        yield ImageRow(ordinal=position, key=key, fault=rejected)


def _unlisted(
    stats: ShardStats | None, *, samples: int, tear: TornShardError | None
) -> Iterator[tuple[str, Rejected]]:
    """Key and reason of each row that is not in the tar, if no sidecar lists them."""
    if tear is None:
        lost = Rejected("missing_sample", _COUNTED)
    else:
        lost = Rejected(tear.reason, f"after {samples} samples: {tear}" if tear.offset else str(tear))
    stats = stats or ShardStats(count=samples + (tear is not None))
    failures = {"download_failed": stats.failed_to_download, "resize_failed": stats.failed_to_resize}
    missing = max(stats.count - samples - sum(failures.values()), 0)
    faults = [lost] * max(missing, int(tear is not None))
    for reason, count in failures.items():
        faults += [Rejected(reason, _COUNTED)] * count
    for number, fault in enumerate(faults):
        yield f".tar-{number}" if number else ".tar", fault


def repeated_key(key: str) -> Rejected:
    """The rejection of a row whose key came before."""
    return Rejected("duplicate_key", f"{key} came before")


@dataclass(kw_only=True)
class _Group:
    """The members of one key, while they are read."""

    key: str
    ordinal: int
    offset: int
    is_in_range: bool
    extensions: dict[str, None] = field(default_factory=dict)
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    fault: Rejected | None = None

    def reject(self, fault: Rejected) -> None:
        """Record a fault; the first one counts."""
        self.fault = self.fault or fault

    def add(self, member: Member, extension: str, settings: ShardSettings) -> None:
        """Check a member, and read it if its extension is known and the group is in range."""
        try:
            if len(self.extensions) == _MAX_MEMBERS:
                raise Rejected("too_many_members", f"{_MAX_MEMBERS} are allowed")
            self.extensions[extension] = None
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
        arrived = list(self.extensions)[: -1 if tear.inside_member else None]
        return {"txt", "json"} <= set(arrived) and not IMAGE_EXTENSIONS.isdisjoint(arrived)


def _groups(shard: SourceFile, settings: ShardSettings, *, start: int) -> Iterator[_Group]:
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
                    group = _Group(
                        key=key, ordinal=ordinal, offset=member.offset, is_in_range=ordinal >= start
                    )
                group.add(member, extension, settings)
        except TornShardError as tear:
            if group is not None and group.survives(tear):
                yield group
            elif group is not None:
                tear.offset = group.offset
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
