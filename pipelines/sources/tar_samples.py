"""Reads the samples of a tar, and accounts for the rows that are not in it.

A sample is a run of members whose names agree up to the first dot: `000000012.jpg`, `.json`, `.txt`. The tar
is read forward once and never extracted. All irregularities are resolved here:

- a key may have dots if its sample has an image and a text: `photo.v1.jpg`, `photo.v1.txt`. Where it has not,
  and a member has the name up to the first dot for its key, the rest is an extension, as in webdataset;
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
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from pipelines.rejections import Rejected
from pipelines.sources.layouts import values_of
from pipelines.sources.listing import SourceFile
from pipelines.sources.parquet_images import ImageRow
from pipelines.sources.settings import ShardSettings
from pipelines.sources.sidecar import Sidecar, read_sidecar, sidecar_url
from pipelines.sources.stats import ShardStats
from pipelines.sources.tar import Member, TornShardError, is_unsafe, read_members
from pipelines.sources.tears import Tear, prefix_digest
from pipelines.storage.objects import open_object

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"])
_READ_EXTENSIONS: Final = IMAGE_EXTENSIONS | {"txt", "json"}
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
        for group in _groups(shard, settings, start=start, sidecar=sidecar):
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
    for number in range(max(missing, int(tear is not None))):
        yield f".tar-{number}" if number else ".tar", lost
    for reason, count in failures.items():
        for number in range(count):
            yield f".tar-{reason}-{number}", Rejected(reason, _COUNTED)


def repeated_key(key: str) -> Rejected:
    """The rejection of a row whose key came before."""
    return Rejected("duplicate_key", f"{key} came before")


@dataclass(kw_only=True)
class _Group:
    """The members of one key, while they are read."""

    family: str
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
            captions=(self.texts.get("txt"), *values_of(metadata, "caption"), *values_of(listed, "caption")),
            metadata=metadata,
            fault=self.fault,
        )

    def is_sample(self, sidecar: Sidecar) -> bool:
        """Whether it has an image and a text or a row of the sidecar, and so a key of its own."""
        has_text = not self.extensions.keys().isdisjoint(("txt", "json")) or sidecar.lists(self.key)
        return has_text and not IMAGE_EXTENSIONS.isdisjoint(self.extensions)

    def may_be_extension(self, sidecar: Sidecar) -> bool:
        """Whether the part of the key after its first dot may turn out to be an extension."""
        return self.family != self.key and not self.is_sample(sidecar)

    def without_content(self) -> "_Group":
        """The group as a rejected row: it has no caption, and the next group's content takes its memory."""
        fault = None if IMAGE_EXTENSIONS.isdisjoint(self.extensions) else Rejected("missing_caption")
        return replace(self, image=None, texts={}, fault=self.fault or fault)

    def shorten_key(self, undecided: list["_Group"], *, start: int) -> None:
        """Make it the group of webdataset's key, which ends at the first dot, with all that is undecided."""
        groups = [*undecided, self]
        self.extensions = {
            f"{group.key.removeprefix(f'{self.family}.')}.{extension}": None
            for group in groups
            for extension in group.extensions
        }
        self.ordinal, self.offset = groups[0].ordinal, groups[0].offset
        self.key, self.is_in_range = self.family, self.ordinal >= start
        self.image, self.texts, self.fault = None, {}, None
        undecided.clear()

    def survives(self, tear: TornShardError) -> bool:
        """Whether image, caption and metadata had all arrived before the tear."""
        arrived = list(self.extensions)[: -1 if tear.inside_member else None]
        return {"txt", "json"} <= set(arrived) and not IMAGE_EXTENSIONS.isdisjoint(arrived)


@dataclass(kw_only=True)
class _Grouping:
    """Puts the members of a tar into groups.

    Attributes:
        undecided: groups of dotted keys without a caption, of one family: a later member may show that their
            keys end in extensions.
        group: that the last member belongs to.
    """

    settings: ShardSettings
    start: int
    sidecar: Sidecar
    undecided: list[_Group] = field(default_factory=list)
    group: _Group | None = None

    def add(self, member: Member) -> Iterator[_Group]:
        """Read a member; yields the groups that end before it."""
        family, key, extension = _split(member.name)
        if not family:
            return
        group = self.group
        if group is not None and group.family == family and family in (key, group.key):
            if group.key != family and not group.is_sample(self.sidecar):
                group.shorten_key(self.undecided, start=self.start)
            if group.key == family:
                key, extension = family, member.name.removeprefix(f"{family}.").lower()
        # A repeated extension begins a second sample of the same key.
        if group is None or key != group.key or extension in group.extensions:
            yield from self._end(family)
            ordinal = 0 if group is None else group.ordinal + 1
            in_range = ordinal >= self.start
            group = _Group(
                family=family, key=key, ordinal=ordinal, offset=member.offset, is_in_range=in_range
            )
        group.add(member, extension, self.settings)
        self.group = group

    def rest(self) -> list[_Group]:
        """The groups that have not been yielded."""
        return self.undecided if self.group is None else [*self.undecided, self.group]

    def _end(self, next_family: str) -> Iterator[_Group]:
        group = self.group
        is_open = group is not None and group.family == next_family and len(self.undecided) < _MAX_MEMBERS
        if group is not None and is_open and group.may_be_extension(self.sidecar):
            self.undecided.append(group.without_content())
        else:
            yield from self.rest()
            self.undecided = []


def _groups(shard: SourceFile, settings: ShardSettings, *, start: int, sidecar: Sidecar) -> Iterator[_Group]:
    groups = _Grouping(settings=settings, start=start, sidecar=sidecar)
    with open_object(shard.url) as file:
        try:
            for member in read_members(file):
                yield from groups.add(member)
        except TornShardError as tear:
            if groups.group is not None and groups.group.survives(tear):
                yield from groups.rest()
            elif rest := groups.rest():
                tear.offset = rest[0].offset
            raise
        yield from groups.rest()


def _split(name: str) -> tuple[str, str, str]:
    """The name up to its first dot, key and extension; empty for `README`, `.DS_Store` and `._00012.jpg`.

    The key ends at the last dot if what follows is an extension that is read: `photo.v1` for `photo.v1.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".") if is_unsafe(name) else base.partition(".")
    if not stem or not dot:
        return "", "", ""
    family, key, extension = f"{folder}{slash}{stem}", f"{folder}{slash}{stem}", extension.lower()
    longer, dot, last = base.rpartition(".")
    if last.lower() in _READ_EXTENSIONS:
        key, extension = f"{folder}{slash}{longer}", last.lower()
    return family, key, extension


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
