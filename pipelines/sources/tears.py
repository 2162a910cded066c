"""Describes the part of a torn shard that was read, so that it can be continued once the shard is whole."""

import hashlib
from dataclasses import dataclass
from typing import Final

from pipelines.storage.objects import open_object

_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Tear:
    """The part of a torn shard that was read.

    Attributes:
        rows: number of its samples, which come first in the shard.
        bytes: of the file before the first sample that could not be read.
        sha256: of these bytes.
    """

    rows: int
    bytes: int
    sha256: str


def prefix_digest(url: str, count: int) -> str:
    """SHA-256 of the first `count` bytes of a file, or of all if there are fewer.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with open_object(url) as file:
        while count > 0 and (data := file.read(min(count, _READ_BYTES))):
            digest.update(data)
            count -= len(data)
    return digest.hexdigest()
