"""The files that a URL means: one file, those of a folder, or those of a glob, on any store fsspec knows."""

from __future__ import annotations

import re
from dataclasses import dataclass

import fsspec

from pipelines.rejections import printable
from pipelines.sources import SourceError
from pipelines.storage.objects import absolute_url, is_local
from pipelines.storage.retry import with_retries


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """A file that was found.

    Attributes:
        url: where it lies.
        name: its path below what was listed, with its ending.
        size: bytes.
    """

    url: str
    name: str
    size: int

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.rpartition(".")[0]


def list_files(url: str, *, endings: tuple[str, ...]) -> list[ListedFile]:
    """The files at `url` whose names have one of these endings, sorted by name; a folder's own, not deeper.

    Names that begin with a dot are left out: they are being written, or another program's.

    Raises:
        SourceError: if the place cannot be listed.
    """
    try:
        found = with_retries(url, lambda: _find(url, endings))
        return sorted(found, key=lambda place: place.name)
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error


def _find(url: str, endings: tuple[str, ...]) -> list[ListedFile]:
    filesystem, path = fsspec.core.url_to_fs(absolute_url(url))
    # Listings are cached for the life of the process, and files may have been added since.
    filesystem.invalidate_cache()
    if filesystem.isdir(path):
        infos, root = filesystem.ls(path, detail=True), path
    elif filesystem.exists(path):
        infos, root = [filesystem.info(path)], path.rpartition("/")[0]
    else:
        infos = filesystem.glob(path, detail=True).values()
        root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    root = root.rstrip("/")
    return [
        ListedFile(
            url=info["name"] if is_local(url) else filesystem.unstrip_protocol(info["name"]),
            name=printable(info["name"].removeprefix(root).removeprefix("/")),
            size=int(info["size"]),
        )
        for info in infos
        if info["type"] == "file" and info["name"].endswith(endings) and not _is_hidden(info["name"])
    ]


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")
