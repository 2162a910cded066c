"""Requests that reach the network and those that do not, against a server that misbehaves in every way."""

import socket
import threading
import time
import urllib.request

import local_web as pages
import pytest

from pipelines.fetching.causes import FetchError
from pipelines.fetching.guard import GuardedOpener, RequestRules

DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "tdm-reservation")
LIMITS = {"max_bytes": 200_000, "max_pixels": 1 << 24, "max_redirects": 3, "seconds": 5.0, "tries": 1}
LIMITS |= {"pause": 0.01, "decode_seconds": 1.0}
SHORT = 0.4
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def web():
    with pages.local_web() as web:
        yield web


def opener(*, private=("127.0.0.1/32",), resolver=socket.getaddrinfo, directives=DIRECTIVES, **limits):
    named = {"agent": "img2dataset", "directives": directives, "private_networks": private}
    return GuardedOpener(RequestRules(**LIMITS | named | limits), resolver=resolver)


def fetch(url, **options):
    request = urllib.request.Request(url, headers={"User-Agent": "a (img2dataset)"})
    return opener(**options).open(request).read()


def cause(url, **options):
    with pytest.raises(FetchError) as caught:
        fetch(url, **options)
    return caught.value.cause


def cases(**causes):
    """Parameters (value, cause), from the values of each cause."""
    return [(value, cause) for cause, values in causes.items() for value in values]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_images_arrive_byte_for_byte(web, kind):
    body = pages.image(1, kind=kind)
    assert fetch(web.serve(f"/{kind}", body)) == body


def test_urlopen_calls_the_installed_opener(web, monkeypatch):
    body = pages.image(2)
    url = web.serve("/opened", body, X_Other="kept")
    monkeypatch.setattr(urllib.request, "_opener", None)
    urllib.request.install_opener(opener())
    request = urllib.request.Request(url, headers={"User-Agent": "who"})
    with urllib.request.urlopen(request, timeout=3) as response:
        assert response.read() == body
        assert response.headers.get_all("X-Other") == ["kept"]
    assert (web.headers["User-Agent"], web.headers["Accept-Encoding"]) == ("who", "identity")


def test_proxies_of_the_environment_are_not_used(web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(web.serve("/direct", pages.image()))


@pytest.mark.parametrize(
    ("status", "expected"),
    cases(gone=(404, 410), refused=(403, 451, 204), too_many_requests=(429,), server_error=(500, 503, 599)),
)
def test_each_status_has_its_cause(web, status, expected):
    assert cause(web.serve(f"/status{status}", b"", status)) == expected


def test_only_transient_causes_are_retried(web):
    assert fetch(web.fails_first("/second", pages.image(3)), tries=2) == pages.image(3)
    assert cause(web.url("/missing"), tries=3) == "gone"
    assert cause(web.serve("/busy", b"", 503), tries=3) == "server_error"
    assert (web.requests["/second"], web.requests["/missing"], web.requests["/busy"]) == (2, 1, 3)


def drips(start, data, *, seconds):
    def reply(visit):
        visit.raw(start)
        visit.drip(data, seconds=seconds)

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        drips(b"", OK + b"X-Long: " + b"a" * 200, seconds=0.05),
        drips(OK + b"Content-Length: 1000\r\n\r\n", b"a" * 200, seconds=0.05),
        drips(CHUNKED, b"1\r\na\r\n" * 60, seconds=0.02),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 20, seconds=0.01),
        lambda visit: time.sleep(2 * SHORT),
    ],
    ids=["headers", "body", "chunks", "continue", "silence"],
)
def test_slow_servers_get_no_more_than_their_seconds(web, reply):
    url = web.answer("/slow", reply)
    began = time.monotonic()
    assert cause(url, seconds=SHORT) == "timed_out"
    assert time.monotonic() - began < SHORT + 0.5


def test_redirects_share_the_seconds_of_an_attempt(web):
    def late(visit):
        time.sleep(0.6 * SHORT)
        visit.say(302, Location=f"/late{int(visit.path[-1]) + 1}")

    for number in (1, 2):
        web.answer(f"/late{number}", late)
    assert cause(web.url("/late1"), seconds=SHORT) == "timed_out"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (OK + b"\r\n", b"a" * 10_000),
        (CHUNKED, b"2710\r\n" + b"a" * 10_000 + b"\r\n"),
        (CHUNKED + b"0\r\n", b"X-Trailer: " + b"a" * 10_000 + b"\r\n"),
        (OK, b"X-Header: " + b"a" * 10_000 + b"\r\n"),
    ],
    ids=["body", "chunks", "trailers", "headers"],
)
def test_endless_responses_are_not_read(web, start, piece):
    def reply(visit):
        visit.raw(start)
        for _ in range(1000):
            visit.raw(piece)

    assert cause(web.answer("/endless", reply)) == "too_large"


def test_announced_sizes_are_refused_before_transfer(web):
    def reply(visit):
        visit.raw(OK + b"Content-Length: 99999999\r\n\r\n")
        time.sleep(SHORT)

    began = time.monotonic()
    assert cause(web.answer("/announced", reply)) == "too_large"
    assert time.monotonic() - began < SHORT


def test_truncated_bodies_are_noticed(web):
    body = pages.image(4)
    assert cause(web.serve("/more", body, Content_Length=str(len(body) + 10))) == "cut_short"
    assert cause(web.serve("/less", body, Content_Length=str(len(body) - 10))) == "broken_image"
    assert cause(web.answer("/chunk", lambda visit: visit.raw(CHUNKED + b"ff\r\nabc"))) == "cut_short"
    assert cause(web.answer("/reset", pages.reset)) == "connection_failed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        OK + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        CHUNKED + b"zz\r\n",
    ],
)
def test_malformed_http_has_a_cause(web, data):
    url = web.answer("/malformed", lambda visit: visit.raw(data))
    assert cause(url) in ("connection_failed", "bad_answer", "cut_short")


def test_compressed_bodies_are_not_unpacked(web):
    assert cause(web.serve("/bomb", pages.gzip_bomb(), Content_Encoding="gzip")) == "bad_answer"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web, status):
    web.serve("/there", pages.image(5))
    assert fetch(web.redirect("/here", "/there", status)) == pages.image(5)


@pytest.mark.parametrize(
    ("to", "expected"),
    cases(
        bad_redirect=(
            *("/circle", "/longer", "", "file:///etc/passwd", "ftp://127.0.0.1/x"),
            *("gopher://127.0.0.1:70/x", "data:image/png;base64,AAAA"),
        ),
        private_address=(
            *("http://169.254.169.254/latest/meta-data/", "//10.0.0.1/x", "http://2130706434/"),
            *("http://0x7f.0.0.2/", "http://0177.0.0.2/", "http://127.2/", "http://[::1]/"),
            *("http://[::ffff:127.0.0.2]/", "http://[::ffff:7f00:2]/", "http://[64:ff9b::a9fe:a9fe]/"),
            *("http://0.0.0.0/", "http://0/"),
        ),
        bad_url=(
            *("http://user@127.0.0.1/", "http://a\\@127.0.0.1/", "http://127.0.0.1:22/"),
            *("http://127.0.0.1:99999/", "http://[fe80::1%25eth0]/", "http://%31%32%37.0.0.1/"),
        ),
    ),
)
def test_forbidden_redirects_are_not_followed(web, to, expected):
    for number in range(8):
        web.redirect(f"/longer{number or ''}", f"/longer{number + 1}")
    assert cause(web.redirect("/circle", to)) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    cases(
        bad_url=("file:///etc/passwd", "ftp://example.org/a.jpg"),
        private_address=(
            *("http://127.0.0.1/", "http://localhost/", "http://169.254.169.254/latest/meta-data/"),
            *("http://10.1.2.3/", "http://100.64.0.1/", "http://224.0.0.1/", "http://[fc00::1]/"),
            "http://[::]/",
        ),
    ),
)
def test_private_addresses_need_permission(url, expected):
    assert cause(url, private=()) == expected


def resolving(*addresses, port=80):
    """A name server that gives these addresses for every name."""
    names = []

    def resolve(host, _port, **_):
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    resolve.names = names
    return resolve


@pytest.mark.parametrize("addresses", [("10.0.0.1",), ("93.184.216.34", "10.0.0.1")])
def test_every_address_of_a_name_is_checked(addresses):
    assert cause("http://a.example/", resolver=resolving(*addresses)) == "private_address"


def test_the_checked_address_is_the_one_connected_to(web):
    url = web.serve("/named", pages.image(6))
    resolver = resolving("127.0.0.1", port=web.port)
    assert fetch(url.replace("127.0.0.1", "images.example"), resolver=resolver) == pages.image(6)
    assert resolver.names == ["images.example"]
    assert web.headers["Host"] == f"images.example:{web.port}"


@pytest.mark.parametrize(
    ("errno", "expected"), [(socket.EAI_NONAME, "no_such_host"), (socket.EAI_AGAIN, "name_server_failed")]
)
def test_missing_names_differ_from_failing_name_servers(errno, expected):
    def resolve(*_, **__):
        raise socket.gaierror(errno, "no")

    assert cause("http://a.example/", resolver=resolve) == expected


def test_a_name_look_up_gets_no_more_than_its_seconds():
    answer = threading.Event()
    began = time.monotonic()
    try:
        found = cause("http://a.example/", resolver=lambda *_, **__: answer.wait(30), seconds=SHORT)
        assert found == "timed_out"
        assert time.monotonic() - began < 5
    finally:
        answer.set()


def test_a_closed_port_is_a_failed_connection():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert cause(f"http://127.0.0.1:{port}/") == "connection_failed"


def test_further_addresses_are_tried(web):
    url = web.serve("/two", pages.image(7)).replace("127.0.0.1", "a.example")
    resolver = resolving("127.0.0.9", "127.0.0.1", port=web.port)
    assert fetch(url, resolver=resolver, private=("127.0.0.0/8",)) == pages.image(7)


def test_certificates_are_verified(tmp_path, monkeypatch):
    certificate = pages.write_certificate(tmp_path, name="images.example")
    with pages.local_web(certificate) as secure:
        secure.serve("/secure", pages.image(8))
        resolver = resolving("127.0.0.1", port=secure.port)
        url, other = (f"https://{name}.example:{secure.port}/secure" for name in ("images", "other"))
        assert cause(url, resolver=resolver) == "bad_certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(url, resolver=resolver) == pages.image(8)
        assert cause(other, resolver=resolver) == "bad_certificate"


def test_a_server_without_tls_is_a_failed_connection(web):
    assert cause(web.serve("/plain", pages.image()).replace("http:", "https:")) == "connection_failed"


def test_opt_outs_are_respected_on_every_redirect(web):
    body = pages.image(8)
    url = web.serve("/optout", body, X_Robots_Tag="noai")
    assert cause(url) == "opted_out"
    hop = web.answer("/hop", lambda visit: visit.say(302, Location="/fine", X_Robots_Tag="noindex"))
    web.serve("/fine", body)
    assert cause(hop) == "opted_out"
    assert fetch(url, directives=()) == body


@pytest.mark.parametrize(
    ("body", "expected"),
    cases(
        empty=(b"",),
        not_an_image=(
            *(b"<!DOCTYPE html><html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4"),
            b"II*\0" + b"\0" * 100,
        ),
        too_many_pixels=(pages.png_of_size(60_000, 60_000),),
        broken_image=(
            *(pages.png_of_size(0, 10), pages.png_of_size(10, 10)[:-12]),
            *(pages.image()[: len(pages.image()) // 2], pages.image(kind="WEBP")[:-20]),
            *(b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\xff\xff", b"RIFF\x04\0\0\0WEBP", b"GIF89a"),
        ),
    ),
)
def test_bodies_that_are_no_sound_image_are_refused(web, body, expected):
    assert cause(web.serve("/body", body)) == expected
