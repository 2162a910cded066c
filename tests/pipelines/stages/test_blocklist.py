import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.hosts import canonical_host, hosts_of
from pipelines.sources.links import Link
from pipelines.sources.webdataset import Sample, Shard
from pipelines.stages.blocklist import Blocklist, load_blocklist, words_of
from pipelines.stages.settings import Blocklists

SHARD = Shard(url="/nowhere/00000.tar", name="00000", size=1)


def listed(folder: Path, **lists: str | bytes) -> Blocklist:
    for name, content in lists.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_blocklist(Blocklists(**{name: str(folder / f"{name}.txt") for name in lists}))


def sample_of(*, image: bytes = b"bytes", caption: str = "c", metadata: dict[str, Any]) -> Sample:
    return Sample(id="a", ordinal=0, key="a", image=image, caption=caption, metadata=metadata, source_id="a")


def verdict(blocked: Blocklist, **given: Any) -> str | None:
    """The reason by which a link is rejected, which must be that of its sample."""
    url, caption = given.get("url", "http://good.example/a.jpg"), given.get("caption", "a caption")
    metadata = given.get("metadata", {})
    link = Link(id="a/0", ordinal=0, url=url, caption=caption, metadata=metadata)
    sample = sample_of(caption=caption, metadata={**metadata, "url": url})
    reasons = []
    for check in (lambda: blocked.check_link(link), lambda: blocked.for_shard(SHARD)(sample, "laion/a/0")):
        try:
            check()
            reasons.append(None)
        except Rejected as rejected:
            reasons.append(rejected.reason)
    assert reasons[0] == reasons[1]
    return reasons[0]


# Domains.

DOMAINS = """# of last month
bad.example
*.worse.example
.Worst.Example.

xn--mnchen-3ya.example
203.0.113.7
[2001:db8::7]
co.example
"""


BLOCKED_URLS = [
    "http://bad.example/a.jpg", "https://bad.example", "http://img.cdn.bad.example/a.jpg",
    "http://BAD.Example/a.jpg", "http://bad.example./a.jpg", "http://bad.example:8080/a.jpg",
    "http://good.example@bad.example/a.jpg", "http://user:word@bad.example:80/a.jpg",
    "http://bad.example\\@good.example/a.jpg", "http://good.example\\@bad.example/a.jpg",
    "http://b%61d.example/a.jpg", "http://bad\uff0eexample/a.jpg", "http://ｂａｄ.example/a.jpg",
    "http://b\u00adad.example/a.jpg", "http://worse.example/a.jpg", "http://a.worse.example/a.jpg",
    "http://worst.example/a.jpg", "http://münchen.example/a.jpg", "http://MÜNCHEN.example/a.jpg",
    "http://www.xn--mnchen-3ya.example/a.jpg", "http://XN--MNCHEN-3YA.example/a.jpg",
    "http://203.0.113.7/a.jpg", "http://3405803783/a.jpg", "http://0xcb.0.0x71.7/a.jpg",
    "http://[2001:DB8:0:0::7]/a.jpg", "http://a.co.example/",
]  # fmt: skip
OTHER_URLS = [
    "http://notbad.example/a.jpg", "http://bad.example.org/a.jpg", "http://bad-example/a.jpg",
    "http://example/bad.example", "http://good.example/?u=http://bad.example/a.jpg",
    "http://good.example/#@bad.example", "http://bad.example:x@good.example/a.jpg",
    "http://bad.example@good.example/a.jpg", "http://munchen.example/a.jpg", "http://203.0.113.77/a.jpg",
    "http://203.0.113.6/a.jpg", "http://[2001:db8::8]/a.jpg",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "reason"),
    [*((url, "blocked_domain") for url in BLOCKED_URLS), *((url, None) for url in OTHER_URLS)],
)
def test_domain_blocks_itself_and_its_subdomains(tmp_path: Path, url: str, reason: str | None) -> None:
    assert verdict(listed(tmp_path, domains=DOMAINS), url=url) == reason


LABELS = st.text("abcdefgh0123456789äöéλжש中", min_size=1, max_size=12)


@settings(deadline=None)
@given(labels=st.lists(LABELS, min_size=1, max_size=4), listed=st.lists(LABELS, min_size=2, max_size=3))
def test_host_is_blocked_by_its_last_labels(labels: list[str], listed: list[str]) -> None:
    entry, host = ".".join(listed), ".".join(labels)
    blocked = Blocklist(domains=frozenset([canonical_host(entry)]))
    below = labels[-len(listed) :] == listed
    # Hosts of digits alone are addresses, and lie below nothing.
    if canonical_host(host) == host and canonical_host(entry) == entry:
        assert (verdict(blocked, url=f"http://{host}/a") == "blocked_domain") is below
    assert verdict(blocked, url=f"http://{entry}/a") == "blocked_domain"


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_hosts_or_none(text: str) -> None:
    for url in (text, f"http://{text}", f"http://{text}/a"):
        for host in hosts_of(url):
            assert host
            assert canonical_host(host)


# Hashes.


def test_hashes_in_metadata_are_blocked(tmp_path: Path) -> None:
    sha, md5 = hashlib.sha256(b"1").hexdigest(), hashlib.md5(b"2").hexdigest()
    blocked = listed(tmp_path, hashes=f"{sha.upper()}\n{md5}\n# phash\n949D1fe559e2cc90\n-4012\n77\n")
    hashes = {"sha256": [sha], "md5": [md5.upper()], "image_phash": ["949d1fe559e2cc90"], "hash": [-4012, 77]}
    for name, value in ((name, value) for name, values in hashes.items() for value in values):
        assert verdict(blocked, metadata={name: value}) == "blocked_hash"
    assert verdict(blocked, metadata={"hash": 78, "sha256": md5, "md5": sha, "image_phash": "77"}) is None
    assert verdict(blocked, metadata={"hash": None, "image_phash": 3}) is None


def test_sixteen_digits_may_be_either_kind(tmp_path: Path) -> None:
    blocked = listed(tmp_path, hashes="1234567890123456\n")
    assert verdict(blocked, metadata={"hash": 1234567890123456}) == "blocked_hash"
    assert verdict(blocked, metadata={"image_phash": "1234567890123456"}) == "blocked_hash"


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_image_bytes_are_hashed(tmp_path: Path, kind: str) -> None:
    blocked = listed(tmp_path, hashes=hashlib.new(kind, b"bad bytes").hexdigest())
    check = blocked.for_shard(SHARD)
    check(sample_of(metadata={}), "a")
    with pytest.raises(Rejected, match=f"blocked_hash: {kind}:"):
        check(sample_of(image=b"bad bytes", metadata={}), "a")


# Terms.

TERMS = "# words\nbad\nvery bad thing\nCafé\ndon't\nstraße\n裸体\nÅngström\n"


BLOCKED_CAPTIONS = [
    "a bad picture", "BAD", "so (bad)!", "bad-tempered", "b\u200bad", "b\u00adad", "ｂａｄ", "𝐛𝐚𝐝",
    "un_bad_un", "a cafe\u0301 at night", "I don’t", "i DON'T know", "die STRASSE", "一张裸体照片",
    "A\u030angstro\u0308m",
]  # fmt: skip
OTHER_CAPTIONS = [
    "badly", "a badge", "sinbad", "b a d", "a cafe at night", "do not", "bäd", "裸の体", "",
]  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "reason"),
    [*((text, "blocked_term") for text in BLOCKED_CAPTIONS), *((text, None) for text in OTHER_CAPTIONS)],
)
def test_terms_match_whole_words_in_any_form(tmp_path: Path, caption: str, reason: str | None) -> None:
    assert verdict(listed(tmp_path, terms=TERMS), caption=caption) == reason


def test_phrase_matches_consecutive_words(tmp_path: Path) -> None:
    blocked = listed(tmp_path, terms="very  bad thing\n")
    assert verdict(blocked, caption="a Very bad -- THING indeed") == "blocked_term"
    assert verdict(blocked, caption="a bad thing, a very bad") is None


WORDS = st.text("abcdeéßж", min_size=1, max_size=4)


@settings(deadline=None)
@given(caption=st.lists(WORDS, max_size=12), term=st.lists(WORDS, min_size=1, max_size=3))
def test_term_matches_if_the_caption_has_its_words(caption: list[str], term: list[str]) -> None:
    blocked = Blocklist(terms=frozenset([" ".join(words_of(" ".join(term)))]))
    folded, words = words_of(" ".join(caption)), words_of(" ".join(term))
    contained = any(folded[start:][: len(words)] == words for start in range(len(folded)))
    assert (verdict(blocked, caption=" ".join(caption)) == "blocked_term") is contained


# Lists.


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        *(
            ("domains", "good.example", entry)
            for entry in ("http://bad.example", "bad.example/a", "bad.example:80", "a b", "*", "u@b")
        ),
        ("hashes", "77", "abc"),
        ("terms", "a", "!!"),
    ],
)
def test_malformed_entry_is_refused_with_its_line(tmp_path: Path, kind: str, good: str, bad: str) -> None:
    with pytest.raises(SourceError, match=rf"{kind}\.txt, line 3: {re.escape(repr(bad))}"):
        listed(tmp_path, **{kind: f"{good}\n\n{bad}\n"})


def test_checks_are_domain_then_hash_then_term(tmp_path: Path) -> None:
    blocked = listed(tmp_path, domains="bad.example", hashes="77", terms="bad")
    url, metadata = "http://bad.example/", {"hash": 77}
    assert verdict(blocked, url=url, metadata=metadata, caption="bad") == "blocked_domain"
    assert verdict(blocked, metadata=metadata, caption="bad") == "blocked_hash"
    assert verdict(blocked, caption="bad") == "blocked_term"


def test_identity_depends_on_entries_not_on_form(tmp_path: Path) -> None:
    first = listed(tmp_path, domains="b.example\nA.example\n", terms="two words\nthree")
    (tmp_path / "other").mkdir()
    second = listed(
        tmp_path / "other",
        domains=b"\xef\xbb\xbf# comment\r\n*.a.example\r\n\r\n  b.example.  \r\nB.EXAMPLE\r\n",
        terms="Three\nTwo  words",
    )
    assert first.describe() == second.describe()
    assert set(first.describe()["blocklists"]) == {"domains", "terms"}
    longer = listed(tmp_path, domains="b.example\na.example\nc.example\n", terms="two words\nthree")
    assert longer.describe()["blocklists"]["domains"] != first.describe()["blocklists"]["domains"]
    assert longer.describe()["blocklists"]["terms"] == first.describe()["blocklists"]["terms"]


def test_identity_has_empty_but_not_unset_lists(tmp_path: Path) -> None:
    assert load_blocklist(Blocklists()).describe() == {}
    assert set(listed(tmp_path, terms="# none yet\n").describe()["blocklists"]) == {"terms"}


def test_blocklist_can_be_pickled(tmp_path: Path) -> None:
    blocked = listed(tmp_path, terms="bad", domains="bad.example", hashes="77")
    assert verdict(blocked, caption="bad") == "blocked_term"
    assert verdict(pickle.loads(pickle.dumps(blocked)), caption="bad") == "blocked_term"


def test_lists_are_read_from_any_store(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/lists/terms.txt", b"bad")
    assert verdict(load_blocklist(Blocklists(terms="memory://lists/terms.txt")), caption="bad")
    with pytest.raises(SourceError, match=r"source\.blocklists\.\w+: .*none\.txt cannot be read"):
        load_blocklist(Blocklists(hashes=str(tmp_path / "none.txt")))
    with pytest.raises(SourceError, match="is not UTF-8"):
        listed(tmp_path, terms=b"\xff\n")
