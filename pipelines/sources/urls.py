"""Expands webdataset's notation of several URLs: `{00000..00099}.tar`, `{a,b}.tar` and `a.tar::b.tar`."""

import itertools
import re
from collections.abc import Iterator

from pipelines.sources import SourceError
from pipelines.storage.objects import is_local, local_path

MAX_URLS = 1_000_000
"""URLs that one notation may stand for; LAION-5B has a quarter of them."""

# Braces with a range or a comma, and no braces inside; others are part of a name.
_BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([^{}]*,[^{}]*))\}")


def expand_urls(url: str) -> list[str]:
    """The URLs that `url` stands for, each once, in the order written.

    `::` separates URLs. `{a,b}` stands for both, `{08..12}` for the integers from 08 to 12, as wide as the
    wider of the two if one begins with 0; `{0..10..5}` counts in steps. A local path that exists is taken as
    it is.

    Raises:
        SourceError: if a URL is empty, or there are more than `MAX_URLS`.
    """
    if is_local(url) and local_path(url).exists():
        return [url]
    parts = url.split("::")
    if not all(parts):
        raise SourceError(f"{url!r} names an empty URL; URLs separated by '::' are accepted")
    expanded = itertools.chain.from_iterable(map(_expand, parts))
    urls = list(dict.fromkeys(itertools.islice(expanded, MAX_URLS + 1)))
    if len(urls) > MAX_URLS:
        raise SourceError(f"{url} stands for more than {MAX_URLS:,} URLs; give a folder or a glob")
    return urls


def _expand(text: str) -> Iterator[str]:
    if not (found := _BRACES.search(text)):
        yield text
        return
    for value in _values(found):
        yield from _expand(f"{text[: found.start()]}{value}{text[found.end() :]}")


def _values(found: re.Match[str]) -> Iterator[str]:
    first, last, step, words = found.groups()
    if words is not None:
        yield from words.split(",")
        return
    padded = any(number.lstrip("-").startswith("0") and len(number) > 1 for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    start, stop, size = int(first), int(last), abs(int(step or 1)) or 1
    numbers = range(start, stop + 1, size) if start <= stop else range(start, stop - 1, -size)
    yield from (f"{number:0{width}d}" for number in numbers)
