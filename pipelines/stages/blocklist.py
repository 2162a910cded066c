"""Rejects rows by blocklists of domains, hashes and terms: text files with one entry a line.

The driver reads the lists once and sends them to the workers with the stage. The set of entries is part of
the table's identity; their order, spelling and comments, and the URLs of the lists, are not.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.hosts import canonical_host, domain_suffixes, hosts_of
from pipelines.sources.layouts import texts_of, values_of
from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.row_filter import RowCheck
from pipelines.stages.settings import Blocklists
from pipelines.storage.objects import StorageError, read_bytes

_HEXADECIMAL: Final = re.compile("[0-9a-f]+")
_INTEGER: Final = re.compile("-?[0-9]{1,19}")
_BY_LENGTH: Final = {64: "sha256", 32: "md5", 16: "phash"}
# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Kana, Han): a term in one of them is
# searched inside runs of letters.
_UNSPACED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, kw_only=True)
class Blocklist:
    """Normalized entries, None for a list that is not set; a `RowFilter` and a `LinkFilter`.

    Attributes:
        domains: as `canonical_host` spells them.
        hashes: kind and value, as in `md5:0cc175b9c0f1b6a831c399e269772661`; kinds sha256, md5, phash, hash.
        terms: as `words_of` spells them.
    """

    domains: frozenset[str] | None = None
    hashes: frozenset[str] | None = None
    terms: frozenset[str] | None = None

    def describe(self) -> Mapping[str, Any]:
        """SHA-256 of each list's entries, sorted."""
        lists = {"domains": self.domains, "hashes": self.hashes, "terms": self.terms}
        digests = {name: _digest(entries) for name, entries in lists.items() if entries is not None}
        return {"blocklists": digests} if digests else {}

    def for_shard(self, shard: Shard) -> RowCheck:
        """The check of a shard's samples, the same for all shards."""
        del shard
        return lambda sample, _id: self.check_sample(sample)

    def check_link(self, link: Link) -> None:
        """Let a link pass, or raise.

        Raises:
            Rejected: `blocked_domain`, `blocked_hash` or `blocked_term`, the first that applies.
        """
        self._check_domains([link.url, *texts_of(link.metadata, "url")])
        self._check_hashes(_metadata_hashes(link.metadata))
        self._check_terms(link.caption)

    def check_sample(self, sample: Sample) -> None:
        """Let a sample pass, or raise as `check_link` does; the bytes of its image are hashed too."""
        self._check_domains(texts_of(sample.metadata, "url"))
        self._check_hashes(_metadata_hashes(sample.metadata))
        self._check_hashes(f"{kind}:{hashlib.new(kind, sample.image).hexdigest()}" for kind in self._computed)
        self._check_terms(sample.caption)

    @cached_property
    def _computed(self) -> tuple[str, ...]:
        """The kinds of hashes to compute: those that the list has."""
        kinds = {entry.partition(":")[0] for entry in self.hashes or ()}
        return tuple(kind for kind in ("sha256", "md5") if kind in kinds)

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        """The numbers of words of the terms: every phrase of a caption is looked up in the set of terms."""
        return tuple(sorted({term.count(" ") + 1 for term in self.terms or ()}))

    @cached_property
    def _unspaced(self) -> re.Pattern[str] | None:
        terms = sorted(term for term in self.terms or () if _UNSPACED.search(term))
        return re.compile("|".join(map(re.escape, terms))) if terms else None

    def _check_domains(self, urls: Iterable[str]) -> None:
        if not self.domains:
            return
        for host in (host for url in urls for host in hosts_of(url)):
            for domain in domain_suffixes(host):
                if domain in self.domains:
                    raise Rejected("blocked_domain", f"{host} is {domain} or below it")

    def _check_hashes(self, hashes: Iterable[str]) -> None:
        for entry in hashes if self.hashes else ():
            if entry in (self.hashes or ()):
                raise Rejected("blocked_hash", entry)

    def _check_terms(self, caption: str) -> None:
        if not self.terms:
            return
        words = words_of(caption)
        for length in self._lengths:
            for start in range(len(words) - length + 1):
                term = " ".join(words[start : start + length])
                if term in self.terms:
                    raise Rejected("blocked_term", term)
        if found := self._unspaced and self._unspaced.search(" ".join(words)):
            raise Rejected("blocked_term", found[0])


def load_blocklist(settings: Blocklists) -> Blocklist:
    """Read the lists that are set.

    Raises:
        SourceError: if one cannot be read, or a line is no entry of its kind; the message names the line.
    """
    return Blocklist(**{kind: _load(kind, getattr(settings, kind)) for kind in _PARSERS})


def words_of(text: str) -> list[str]:
    """Normalized words: runs of letters, marks and digits, case folded, compatible characters unified (NFKC).

    Invisible characters, such as a zero-width space, do not separate words.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kinds = ((letter, unicodedata.category(letter)) for letter in folded)
    return "".join(letter if kind[0] in "LMN" else " " for letter, kind in kinds if kind != "Cf").split()


def _metadata_hashes(metadata: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("sha256", "md5"):
        yield from (f"{kind}:{text.lower()}" for text in texts_of(metadata, kind))
    yield from (f"phash:{text.lower()}" for text in texts_of(metadata, "perceptual_hash"))
    yield from (f"hash:{value}" for value in values_of(metadata, "url_text_hash"))


def _load(kind: str, url: str | None) -> frozenset[str] | None:
    if url is None:
        return None
    parse, expected = _PARSERS[kind]
    try:
        lines = read_bytes(url).decode("utf-8-sig").splitlines()
    except StorageError as error:
        raise SourceError(f"source.blocklists.{kind}: {error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"source.blocklists.{kind}: {url} is not UTF-8: {error}") from None
    entries: set[str] = set()
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            parsed = tuple(parse(text))
            if not parsed:
                raise SourceError(f"blocklist {url}, line {number}: {text!r} is {expected}")
            entries.update(parsed)
    return frozenset(entries)


def _domain(text: str) -> Iterator[str]:
    name = canonical_host(text.removeprefix("*").removeprefix(".").removeprefix("[").removesuffix("]"))
    # The only hosts with a colon are IPv6 addresses; elsewhere a colon precedes a port.
    if (
        name
        and not re.search(r"[\s/@?#*\\]", name)
        and (":" not in name or name in hosts_of(f"http://[{name}]"))
    ):
        yield name


def _hash(text: str) -> Iterator[str]:
    value = text.lower()
    if _HEXADECIMAL.fullmatch(value) and len(value) in _BY_LENGTH:
        yield f"{_BY_LENGTH[len(value)]}:{value}"
    if _INTEGER.fullmatch(value):
        yield f"hash:{int(value)}"


def _term(text: str) -> Iterator[str]:
    words = " ".join(words_of(text))
    if words:
        yield words


_PARSERS: Final[Mapping[str, tuple[Callable[[str], Iterable[str]], str]]] = {
    "domains": (_domain, "no host: give example.org, without scheme, port or path"),
    "hashes": (_hash, "no hash: give 64, 32 or 16 hexadecimal digits, or an integer"),
    "terms": (_term, "no term: give at least one letter or digit"),
}
"""Of each kind of list, what makes entries of a line, and what the message says of a line without one."""


def _digest(entries: frozenset[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
