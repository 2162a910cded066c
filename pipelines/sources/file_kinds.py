"""Names what a file is by its first bytes, where a shard was expected."""

from typing import Final

PARQUET: Final = "a Parquet file"
_KINDS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip: decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it"),
    (b"BZh", "compressed with bzip2: decompress it"),
    (b"\xfd7zXZ\x00", "compressed with xz: decompress it"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PAR1", PARQUET),
    (b"ARROW1", "an Arrow file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"%PDF-", "a PDF document"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n", "a PNG image"),
)
_TEXTS: Final = (
    (b"<!doctype html", "an HTML page, such as a server's error"),
    (b"<html", "an HTML page, such as a server's error"),
    (b"<?xml", "an XML document, such as a store's error"),
    (b"{", "JSON, such as a server's error"),
)


def kind_of(head: bytes) -> str | None:
    """The kind of a file that begins with these bytes, in words; None if it is not known."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    known = (name for begins, name in _KINDS if head.startswith(begins))
    return next(known, None) or next((name for begins, name in _TEXTS if text.startswith(begins)), None)
