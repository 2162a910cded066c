"""Lists the files that a URL names: files, folders' files, or globs, on any fsspec store."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.rejections import printable
from pipelines.sources import SourceError
from pipelines.sources.urls import expand_urls
from pipelines.storage.retry import with_retries

# The local file system's name, and those of S3, Google's and Azure's stores, and of memory.
_MODIFIED = ("mtime", "LastModified", "updated", "last_modified", "created")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of input rows.

    Attributes:
        url: a local path or an object-store URL.
        name: path below the listed folder, without the ending; the first part of its rows' ids.
        size: bytes.
        modified: when it was last written, in seconds since 1970; None if the store does not say.
    """

    url: str
    name: str
    size: int
    modified: float | None = field(default=None, compare=False)

    @property
    def file_name(self) -> str:
        """`name` with the ending."""
        return f"{self.name}.{self.url.rpartition('.')[2]}"


def list_files(url: str, *, endings: tuple[str, ...]) -> list[SourceFile]:
    """The files at `url` with one of these endings, sorted by path; a folder is not searched recursively.

    `url` may stand for several, as `expand_urls` has it; names are then relative to the folder that contains
    all of them. Links are followed. Names that begin with a dot are skipped: they are unfinished writes or
    other programs' files.

    Raises:
        SourceError: if `url` cannot be listed, one of several URLs names nothing, or a link leads nowhere.
    """
    urls = expand_urls(url)
    try:
        found = [with_retries(url, partial(_find, urls[0]))] if len(urls) == 1 else list(_find_each(urls))
        files = {_url(one.store, entry["name"]): entry for one in found for entry in _files(one, endings)}
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error
    root = _common_folder([_url(one.store, one.folder) for one in found])
    names = {file: printable(file.removeprefix(root).removeprefix("/")) for file in files}
    return [
        SourceFile(
            url=file,
            name=names[file].rpartition(".")[0],
            size=int(files[file]["size"]),
            modified=_modified(files[file]),
        )
        for file in sorted(files, key=printable)
    ]


@dataclass(frozen=True)
class _Found:
    """Entries of a store as fsspec describes them, and the folder that their names are relative to."""

    store: fsspec.AbstractFileSystem
    folder: str
    entries: Sequence[Mapping[str, Any]]


def _find(url: str) -> _Found:
    store, path = fsspec.core.url_to_fs(url)
    # fsspec caches listings for the life of the process, and files may have been added since.
    store.invalidate_cache()
    # A folder's or file's own name may contain brackets, so the glob comes last.
    if store.isdir(path):
        return _Found(store, path, store.ls(path, detail=True))
    if store.exists(path):
        return _Found(store, _folder_of(path), [store.info(path)])
    entries = list(store.glob(path, detail=True).values())
    return _Found(store, _folder_of(re.split(r"[*?\[]", path)[0]), entries)


def _find_each(urls: Sequence[str]) -> Iterator[_Found]:
    """Raises SourceError for the first URL that names nothing."""
    for folder, members in itertools.groupby(sorted(urls, key=_folder_of), key=_folder_of):
        # One listing of the folder instead of a round trip for each of its files.
        present = with_retries(folder, partial(_list_folder, folder))
        for url in members:
            found = present.get(url.rpartition("/")[2]) or with_retries(url, partial(_find, url))
            if not found.entries:
                raise SourceError(
                    f"nothing at {url}: each of several URLs must name a file, a folder or a glob"
                )
            yield found


def _list_folder(url: str) -> dict[str, _Found]:
    """The files of a folder by their own names; empty if there is no such folder."""
    store, path = fsspec.core.url_to_fs(url)
    store.invalidate_cache()
    try:
        entries = [entry for entry in store.ls(path, detail=True) if entry["type"] != "directory"]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {entry["name"].rpartition("/")[2]: _Found(store, path, [entry]) for entry in entries}


def _files(found: _Found, endings: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The entries of files with these endings; those of links have the values of their targets."""
    for entry in found.entries:
        name = str(entry["name"])
        if not name.endswith(endings) or name.rpartition("/")[2].startswith("."):
            continue
        # A folder's listing describes a link, not the file that it leads to.
        target = _target(found.store, entry) if entry["type"] == "other" else entry
        if target["type"] == "file":
            yield {**target, "name": name}


def _modified(entry: Mapping[str, Any]) -> float | None:
    """When a file was last written, in seconds since 1970, under whatever name its store says it."""
    value = next((entry[name] for name in _MODIFIED if entry.get(name)), None)
    if isinstance(value, str):  # Google's store
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else value


def _target(store: fsspec.AbstractFileSystem, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        target: Mapping[str, Any] = store.info(entry["name"])
    except FileNotFoundError:
        link = f"{entry['name']} is a link to {entry.get('destination')}"
        raise SourceError(f"{link}, which does not exist: restore the file or remove the link") from None
    return target


def _url(store: fsspec.AbstractFileSystem, name: str) -> str:
    return name if isinstance(store, LocalFileSystem) else str(store.unstrip_protocol(name))


def _folder_of(url: str) -> str:
    return url.rpartition("/")[0]


def _common_folder(folders: Sequence[str]) -> str:
    """The longest path that is above or equal to all of these URLs of folders; empty if there is none."""
    parts = zip(*(folder.rstrip("/").split("/") for folder in folders), strict=False)
    return "/".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, parts))
