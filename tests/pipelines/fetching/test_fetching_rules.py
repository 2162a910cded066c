"""Addresses, URLs, opt-outs, image headers and causes, without a network."""

import io
import ipaddress
from email.message import Message

import pytest
from PIL import Image

from pipelines.fetching.addresses import may_connect, parse_networks
from pipelines.fetching.causes import CAUSES, PERMANENT, TRANSIENT, FetchError, cause_of
from pipelines.fetching.image_headers import check_image
from pipelines.fetching.optout import find_opt_out
from pipelines.fetching.urls import parse_url

PUBLIC = "8.8.8.8 2606:2800:220:1::1 ::ffff:8.8.8.8 64:ff9b::808:808"
PRIVATE = """
192.168.1.1 172.16.0.1 169.254.169.254 192.0.0.8 198.18.0.1 203.0.113.1 240.0.0.1 255.255.255.255 239.1.2.3
192.88.99.1 ::127.0.0.1 ::ffff:192.168.1.1 64:ff9b::c0a8:101 2002:7f00:1:: 2001:0:1:: 2001:db8::1 fe80::1
fec0::1 3fff::1 2001:4:112::1 ff02::1
"""


@pytest.mark.parametrize(
    ("address", "expected"), [(one, one in PUBLIC.split()) for one in (PUBLIC + PRIVATE).split()]
)
def test_only_global_unicast_is_public(address, expected):
    assert may_connect(ipaddress.ip_address(address)) is expected
    assert may_connect(ipaddress.ip_address(address), allowed=parse_networks(["0.0.0.0/0", "::/0"]))


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("http://a.example", "a.example", "/"),
        ("http://a.example/ä b?q=ü c#part", "a.example", "/%C3%A4%20b?q=%C3%BC%20c"),
        ("http://a.example/a%20b?u=http://x/", "a.example", "/a%20b?u=http://x/"),
        ("http://bücher.example/x", "xn--bcher-kva.example", "/x"),
        ("http://a.example/" + "x" * 8000, "a.example", "/" + "x" * 8000),
        (" http://a.example/x ", "a.example", "/x"),
    ],
)
def test_urls_are_escaped_as_browsers_do(url, host, path):
    assert (parse_url(url).host, parse_url(url).path) == (host, path)


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.example/a\nb", "http://a.example/a\r\nHost: b", "http://a.example/\x00", "http:///x"),
        *("http://user:word@a.example/", "http://a b/", "http://" + "a" * 300 + "/", "http://[::1"),
        *("http://a.example/" + "x" * 10_000, "http://a.example:x/", "http://a.example/\udcff"),
    ],
)
def test_ambiguous_urls_are_refused(url):
    with pytest.raises(FetchError, match="bad_url"):
        parse_url(url)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["X-Robots-Tag: noai"], "noai"),
        (["X-Robots-Tag: NoImageAI, nofollow"], "noimageai"),
        (["X-Robots-Tag: nofollow", "X-Robots-Tag: noindex"], "noindex"),
        (["X-Robots-Tag: none"], "noindex"),
        (["X-Robots-Tag: img2dataset: noai"], "noai"),
        (["X-Robots-Tag: nofollow, img2dataset: noai"], "noai"),
        (["X-Robots-Tag: *: noai"], "noai"),
        (["X-Robots-Tag: otherbot: noai"], ""),
        (["X-Robots-Tag: otherbot: nofollow, noai"], ""),
        (["X-Robots-Tag: otherbot: noai, img2dataset: noindex"], "noindex"),
        (["X-Robots-Tag: unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["X-Robots-Tag: noai, unavailable_after: 25 Jun 2030 15:00:00 PST"], "noai"),
        (["X-Robots-Tag: max-image-preview: large"], ""),
        (["TDM-Reservation: 1"], "tdm-reservation"),
        (["TDM-Reservation: 0"], ""),
        (["X-Robots-Tag: index, follow"], ""),
        ([], ""),
    ],
)
def test_opt_outs_apply_to_us_or_to_all(lines, expected):
    headers = Message()
    for line in lines:
        name, _, value = line.partition(": ")
        headers[name] = value
    directives = frozenset(["noai", "noimageai", "noindex", "noimageindex", "tdm-reservation"])
    assert find_opt_out(headers, agent="img2dataset", directives=directives) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"progressive": True}])
def test_headers_are_read_as_pillow_does(kind, options):
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(buffer, kind, **options)
    check_image(buffer.getvalue(), max_pixels=300 * 200)
    with pytest.raises(FetchError, match="too_many_pixels: 300 x 200"):
        check_image(buffer.getvalue(), max_pixels=300 * 200 - 1)


def test_causes_are_found_in_messages():
    assert not TRANSIENT.keys() & PERMANENT.keys()
    for cause in CAUSES:
        assert cause_of(str(FetchError(cause, "why: so"))) == cause
    assert cause_of("anything else") == "bad_answer"
    assert len(str(FetchError("gone", "é" * 1000))) < 200
    assert str(FetchError("gone", "é\udcff")).isascii()
    with pytest.raises(ValueError, match="unknown"):
        FetchError("unknown")
