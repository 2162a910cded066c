"""Lists and reads real images: files of a folder, or members of the tars in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import fsspec

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.tar import TornShardError, read_members
from pipelines.sources.tar_samples import IMAGE_EXTENSIONS
from pipelines.storage.objects import open_object, read_bytes

_MAX_IMAGE_BYTES = 64 << 20
_MAX_JSON_BYTES = 1 << 20
_IN_TAR = re.compile(r"(?P<tar>.+\.tar)@(?P<offset>\d+)/(?P<member>.+)")


@dataclass(frozen=True, kw_only=True)
class RealImage:
    """An image.

    Attributes:
        name: its URL; of a member of a tar the tar's URL, "@", the offset of its header, "/" and its name.
        file_name: under which it was published: the last part of its name, or of the URL in its .json.
    """

    name: str
    file_name: str


def list_real_images(url: str) -> list[RealImage]:
    """All images of a folder and of the tars in it, in order of their names.

    A tar is read once, and its images are named by their offsets in it.

    Raises:
        SourceError: if a tar is damaged.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    images: list[RealImage] = []
    # Sorted: stores list in different orders.
    for found in sorted(filesystem.find(path)):
        ending, name = found.rpartition(".")[2].lower(), filesystem.unstrip_protocol(found)
        if ending in IMAGE_EXTENSIONS:
            images.append(RealImage(name=name, file_name=found.rpartition("/")[2]))
        elif ending == "tar":
            images += _list_tar(name)
    return images


def read_real_image(name: str) -> bytes:
    """The bytes of the image of that name.

    Raises:
        Rejected: if it is larger than 64 MiB.
        SourceError: if its tar has another member there.
    """
    match = _IN_TAR.fullmatch(name)
    if match is None:
        return read_bytes(name)
    with open_object(match["tar"]) as file:
        file.seek(int(match["offset"]))
        try:
            member = next(read_members(file), None)
            if member is not None and member.name == match["member"]:
                return member.read(max_bytes=_MAX_IMAGE_BYTES)
        except TornShardError:
            pass
    raise SourceError(f"{match['tar']} was changed: {match['member']} is no longer where it was listed")


def _list_tar(url: str) -> Iterator[RealImage]:
    """The first image of each sample of a tar."""
    images: dict[str, RealImage] = {}
    file_names: dict[str, str] = {}
    try:
        with open_object(url) as file:
            for member in read_members(file):
                key, _, ending = member.name.rpartition(".")
                try:
                    member.check()
                    if ending.lower() in IMAGE_EXTENSIONS and key not in images:
                        name = f"{url}@{member.offset}/{member.name}"
                        images[key] = RealImage(name=name, file_name=member.name.rpartition("/")[2])
                    elif ending == "json":
                        published = _published_name(member.read(max_bytes=_MAX_JSON_BYTES))
                        if published:
                            file_names[key] = published
                except Rejected:
                    continue  # not an image that could be read
    except TornShardError as error:
        raise SourceError(f"{url} is damaged: {error}") from None
    for key in sorted(images):
        yield replace(images[key], file_name=file_names.get(key, images[key].file_name))


def _published_name(metadata: bytes) -> str | None:
    """The last part of the URL in a sample's .json, as img2dataset writes it."""
    try:
        url = json.loads(metadata).get("url")
    except (ValueError, AttributeError):
        return None
    return url.partition("?")[0].rpartition("/")[2] if isinstance(url, str) else None
