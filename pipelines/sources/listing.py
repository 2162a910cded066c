"""Lists the files that a URL names: one file, a folder's files, or a glob, on any fsspec store."""

import re
from dataclasses import dataclass

import fsspec

from pipelines.rejections import printable
from pipelines.sources import SourceError
from pipelines.storage.objects import is_local
from pipelines.storage.retry import with_retries


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of input rows.

    Attributes:
        url: a local path or an object-store URL.
        name: path below the listed folder, without the ending; the first part of its rows' ids.
        size: bytes.
    """

    url: str
    name: str
    size: int

    @property
    def file_name(self) -> str:
        """`name` with the ending."""
        return f"{self.name}.{self.url.rpartition('.')[2]}"


def list_files(url: str, *, endings: tuple[str, ...]) -> list[SourceFile]:
    """The files at `url` with one of these endings, sorted by path; a folder is not searched recursively.

    Names that begin with a dot are skipped: they are unfinished writes or other programs' files.

    Raises:
        SourceError: if `url` cannot be listed.
    """
    try:
        return with_retries(url, lambda: _find(url, endings))
    except Exception as error:
        raise SourceError(f"{url} cannot be listed: {error}") from error


def _find(url: str, endings: tuple[str, ...]) -> list[SourceFile]:
    filesystem, path = fsspec.core.url_to_fs(url)
    # fsspec caches listings for the life of the process, and files may have been added since.
    filesystem.invalidate_cache()
    # A folder's or file's own name may contain brackets, so the glob comes last.
    if filesystem.isdir(path):
        infos, root = filesystem.ls(path, detail=True), path
    elif filesystem.exists(path):
        infos, root = [filesystem.info(path)], path.rpartition("/")[0]
    else:
        infos = filesystem.glob(path, detail=True).values()
        root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    root = root.rstrip("/")
    sizes = {info["name"]: int(info["size"]) for info in infos if info["type"] == "file"}
    return [
        SourceFile(
            url=name if is_local(url) else filesystem.unstrip_protocol(name),
            name=printable(name.removeprefix(root).removeprefix("/").rpartition(".")[0]),
            size=sizes[name],
        )
        for name in sorted(sizes, key=printable)
        if name.endswith(endings) and not name.rpartition("/")[2].startswith(".")
    ]
