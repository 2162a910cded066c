"""Reads lines and CSV records of text files, whatever their encoding mark, line ends and unclosed quotes."""

import codecs
import csv
import itertools
from collections import deque
from collections.abc import Iterator
from typing import IO

from pipelines.sources import SourceError

_CHUNK_BYTES = 1 << 20
# Bounds memory: longer lines are truncated, which makes of JSON or CSV a bad row. Captions of a .txt are
# truncated much further by the settings.
_MAX_LINE_BYTES = 4 << 20
# UTF-32's mark begins with that of UTF-16, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines as UTF-8 without their ends, each truncated to 4 MiB, in bounded memory.

    A line ends with LF, CR LF or CR. A file that begins with the mark of UTF-16 is converted; what is invalid
    stays invalid.

    Raises:
        SourceError: if the file begins with the mark of UTF-32.
    """
    line = bytearray()
    ends_with_cr = False
    for chunk in utf8_chunks(file):
        data = chunk.removeprefix(b"\n") if ends_with_cr else chunk
        ends_with_cr = chunk.endswith(b"\r")
        *ends, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for end in ends:
            line += end[: _MAX_LINE_BYTES - len(line)]
            yield bytes(line)
            line.clear()
        line += rest[: _MAX_LINE_BYTES - len(line)]
    if line:
        yield bytes(line)


def utf8_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The content as UTF-8 without its mark; what is invalid stays invalid.

    Raises:
        SourceError: if the file begins with the mark of UTF-32.
    """
    first = file.read(_CHUNK_BYTES)
    mark, encoding = next((one for one in _MARKS.items() if first.startswith(one[0])), (b"", "utf-8"))
    chunks = itertools.chain([first.removeprefix(mark)], iter(lambda: file.read(_CHUNK_BYTES), b""))
    if encoding == "UTF-32":
        raise SourceError("the file is UTF-32; UTF-8 and UTF-16 with its mark are accepted")
    if encoding == "utf-8":
        yield from chunks
        return
    # Lone surrogates pass, and then cost only the line that they occur in.
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    if decoder.getstate()[0]:
        yield b"\xff"  # half a character at the end


def read_records(lines: Iterator[str]) -> Iterator[list[str] | csv.Error]:
    """The records of a CSV file, each as its fields or as why it cannot be parsed.

    A quoted field may span lines. If a quote is not closed, or by one that begins another field, its line
    alone is an error, and the lines after it are read on their own.
    """
    ahead: deque[str] = deque()
    taken: list[str] = []
    reader = csv.reader(_take(lines, ahead, taken), strict=True)
    while True:
        taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            first, *others = taken
            ahead.extendleft(reversed(others))
            yield _unquoted(first, error)
            reader = csv.reader(_take(lines, ahead, taken), strict=True)


def _take(lines: Iterator[str], ahead: deque[str], taken: list[str]) -> Iterator[str]:
    """The next lines, first those read `ahead` after an unclosed quote; each is put into `taken`."""
    while (line := ahead.popleft() if ahead else next(lines, None)) is not None:
        taken.append(line)
        yield line + "\n"


def _unquoted(line: str, error: csv.Error) -> list[str] | csv.Error:
    """The fields of a line with text after a closing quote, as Python's parser reads it; else the error."""
    reader = csv.reader([line, ""])
    try:
        fields = next(reader)
    except csv.Error as fault:
        return fault
    return fields if reader.line_num == 1 else csv.Error(f"a quote that is not closed ({error})")
