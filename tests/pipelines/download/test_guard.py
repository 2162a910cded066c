"""What reaches the network and what does not, against a server that answers in every way."""

import io
import socket
import time
import urllib.request
from email.message import Message

import local_web as pages
import pytest
from PIL import Image

from pipelines.fetching.addresses import may_connect, parse_networks
from pipelines.fetching.causes import CAUSES, PERMANENT, TRANSIENT, FetchError, cause_of
from pipelines.fetching.guard import GuardedOpener, RequestLimits, parse_url
from pipelines.fetching.optout import find_opt_out
from pipelines.fetching.pictures import check_image

DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "tdm-reservation")
LIMITS = RequestLimits(
    max_bytes=200_000, max_pixels=1 << 24, max_redirects=3, seconds=5.0, tries=1, pause=0.01
)
SHORT = 0.4


@pytest.fixture(scope="module")
def web():
    with pages.local_web() as web:
        yield web


def guard(*, private=("127.0.0.1/32",), lookup=socket.getaddrinfo, directives=DIRECTIVES, **changed):
    return GuardedOpener(
        limits=RequestLimits(**(vars(LIMITS) | changed)),
        agent="img2dataset",
        directives=directives,
        private_networks=private,
        lookup=lookup,
    )


def fetch(url, **options):
    return (
        guard(**options).open(urllib.request.Request(url, headers={"User-Agent": "a (img2dataset)"})).read()
    )


def cause(url, **options):
    with pytest.raises(FetchError) as caught:
        fetch(url, **options)
    return caught.value.cause


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_a_picture_arrives_byte_for_byte(web, kind):
    body = pages.picture(1, kind=kind)
    assert fetch(web.serve(f"/{kind}", body)) == body


def test_it_is_what_urlopen_calls(web, monkeypatch):
    body = pages.picture(2)
    url = web.serve("/opened", body, X_Other="kept")
    monkeypatch.setattr(urllib.request, "_opener", None)
    urllib.request.install_opener(guard())
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"User-Agent": "who"}), timeout=3
    ) as answer:
        assert answer.read() == body
        assert answer.headers.get_all("X-Other") == ["kept"]
    assert web.headers["User-Agent"] == "who"
    assert web.headers["Accept-Encoding"] == "identity"


def test_proxies_of_the_environment_are_not_used(web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(web.serve("/direct", pages.picture()))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, "gone"),
        (410, "gone"),
        (403, "refused"),
        (451, "refused"),
        (204, "refused"),
        (429, "too_many_requests"),
        (500, "server_error"),
        (503, "server_error"),
        (599, "server_error"),
    ],
)
def test_a_status_has_its_cause(web, status, expected):
    assert cause(web.serve(f"/status{status}", b"", status)) == expected


def test_what_may_pass_is_tried_again_and_nothing_else(web):
    url = web.fails_first("/second", pages.picture(3))
    assert fetch(url, tries=2) == pages.picture(3)
    missing = web.url("/missing")
    assert cause(missing, tries=3) == "gone"
    busy = web.serve("/busy", b"", 503)
    assert cause(busy, tries=3) == "server_error"
    assert (web.asked["/second"], web.asked["/missing"], web.asked["/busy"]) == (2, 1, 3)


def slow_headers(visit):
    visit.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 200, seconds=0.05)


def slow_body(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    visit.drip(b"a" * 200, seconds=0.05)


def slow_chunks(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    visit.drip(b"1\r\na\r\n" * 60, seconds=0.02)


def endless_continue(visit):
    visit.drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 20, seconds=0.01)


def silence(visit):
    time.sleep(2 * SHORT)


@pytest.mark.parametrize("reply", [slow_headers, slow_body, slow_chunks, endless_continue, silence])
def test_a_server_that_takes_its_time_gets_no_more_than_its_seconds(web, reply):
    url = web.answer(f"/{reply.__name__}", reply)
    began = time.monotonic()
    assert cause(url, seconds=SHORT) == "timed_out"
    assert time.monotonic() - began < SHORT + 0.5


def test_redirections_share_the_seconds_of_a_try(web):
    def late(to):
        def reply(visit):
            time.sleep(0.6 * SHORT)
            visit.say(302, Location=to)

        return reply

    web.answer("/late1", late("/late2"))
    web.answer("/late2", late("/late3"))
    assert cause(web.url("/late1"), seconds=SHORT) == "timed_out"


def endless(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        visit.raw(b"a" * 10_000)


def endless_chunks(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        visit.raw(b"2710\r\n" + b"a" * 10_000 + b"\r\n")


def endless_chunk_extension(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    for _ in range(1000):
        visit.raw(b"X-Trailer: " + b"a" * 10_000 + b"\r\n")


def endless_headers(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        visit.raw(b"X-%d: " % number + b"a" * 10_000 + b"\r\n")


@pytest.mark.parametrize("reply", [endless, endless_chunks, endless_chunk_extension, endless_headers])
def test_more_bytes_than_allowed_are_not_read(web, reply):
    assert cause(web.answer(f"/{reply.__name__}", reply)) == "too_large"


def test_an_announced_size_is_believed_before_it_is_sent(web):
    def boast(visit):
        visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")
        time.sleep(SHORT)

    began = time.monotonic()
    assert cause(web.answer("/boast", boast)) == "too_large"
    assert time.monotonic() - began < SHORT


def test_a_promise_that_is_not_kept_is_a_body_cut_short(web):
    body = pages.picture(4)
    assert cause(web.serve("/promise", body, Content_Length=str(len(body) + 10))) == "cut_short"
    assert cause(web.serve("/less", body, Content_Length=str(len(body) - 10))) == "broken_image"
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"
    assert cause(web.answer("/chunk", lambda visit: visit.raw(chunk))) == "cut_short"
    assert cause(web.answer("/reset", pages.reset)) == "connection_failed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_has_a_cause(web, data):
    url = web.answer("/nothttp", lambda visit: visit.raw(data))
    assert cause(url) in ("connection_failed", "bad_answer", "cut_short")


def test_packed_bodies_are_not_unpacked(web):
    url = web.serve("/bomb", pages.gzip_bomb(), Content_Encoding="gzip")
    assert cause(url) == "bad_answer"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_followed(web, status):
    web.serve("/there", pages.picture(5))
    assert fetch(web.redirect("/here", "/there", status)) == pages.picture(5)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("/circle", "bad_redirect"),
        ("/longer", "bad_redirect"),
        ("", "bad_redirect"),
        ("file:///etc/passwd", "bad_redirect"),
        ("ftp://127.0.0.1/x", "bad_redirect"),
        ("gopher://127.0.0.1:70/x", "bad_redirect"),
        ("data:image/png;base64,AAAA", "bad_redirect"),
        ("http://169.254.169.254/latest/meta-data/", "private_address"),
        ("//10.0.0.1/x", "private_address"),
        ("http://2130706434/", "private_address"),
        ("http://0x7f.0.0.2/", "private_address"),
        ("http://0177.0.0.2/", "private_address"),
        ("http://127.2/", "private_address"),
        ("http://[::1]/", "private_address"),
        ("http://[::ffff:127.0.0.2]/", "private_address"),
        ("http://[::ffff:7f00:2]/", "private_address"),
        ("http://[64:ff9b::a9fe:a9fe]/", "private_address"),
        ("http://0.0.0.0/", "private_address"),
        ("http://0/", "private_address"),
        ("http://user@127.0.0.1/", "bad_url"),
        ("http://a\\@127.0.0.1/", "bad_url"),
        ("http://127.0.0.1:22/", "bad_url"),
        ("http://127.0.0.1:99999/", "bad_url"),
        ("http://[fe80::1%25eth0]/", "bad_url"),
        ("http://%31%32%37.0.0.1/", "bad_url"),
    ],
)
def test_a_redirection_to_where_nobody_may_go_is_not_followed(web, to, expected):
    web.redirect("/longer", "/longer2")
    for number in range(2, 9):
        web.redirect(f"/longer{number}", f"/longer{number + 1}")
    assert cause(web.redirect("/circle", to)) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///etc/passwd", "bad_url"),
        ("ftp://example.org/a.jpg", "bad_url"),
        ("http://127.0.0.1/", "private_address"),
        ("http://localhost/", "private_address"),
        ("http://169.254.169.254/latest/meta-data/", "private_address"),
        ("http://10.1.2.3/", "private_address"),
        ("http://100.64.0.1/", "private_address"),
        ("http://224.0.0.1/", "private_address"),
        ("http://[fc00::1]/", "private_address"),
        ("http://[::]/", "private_address"),
    ],
)
def test_nothing_private_is_fetched_unless_told_to(url, expected):
    assert cause(url, private=()) == expected


def resolving(*addresses, port=80):
    """A name server that gives these addresses for every name."""
    asked = []

    def lookup(host, _port, **_):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    lookup.asked = asked
    return lookup


def test_a_name_is_judged_by_every_address_it_has(web):
    assert cause("http://a.example/", lookup=resolving("10.0.0.1")) == "private_address"
    assert cause("http://a.example/", lookup=resolving("93.184.216.34", "10.0.0.1")) == "private_address"


def test_a_name_is_looked_up_once_and_the_address_that_was_judged_is_the_one_connected_to(web):
    url = web.serve("/named", pages.picture(6))
    lookup = resolving("127.0.0.1", port=web.port)
    body = fetch(url.replace("127.0.0.1", "pictures.example"), lookup=lookup)
    assert body == pages.picture(6)
    assert lookup.asked == ["pictures.example"]
    assert web.headers["Host"] == f"pictures.example:{web.port}"


@pytest.mark.parametrize(
    ("errno", "expected"),
    [(socket.EAI_NONAME, "no_such_host"), (socket.EAI_AGAIN, "name_server_failed")],
)
def test_a_name_that_does_not_exist_is_told_from_a_server_that_does_not_answer(errno, expected):
    def lookup(*_, **__):
        raise socket.gaierror(errno, "no")

    assert cause("http://a.example/", lookup=lookup) == expected


def test_nobody_listening_is_a_failed_connection():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert cause(f"http://127.0.0.1:{port}/") == "connection_failed"


def test_the_second_address_is_tried_when_the_first_does_not_answer(web):
    url = web.serve("/two", pages.picture(7)).replace("127.0.0.1", "a.example")
    lookup = resolving("127.0.0.9", "127.0.0.1", port=web.port)
    assert fetch(url, lookup=lookup, private=("127.0.0.0/8",)) == pages.picture(7)


def test_a_server_must_prove_who_it_is(tmp_path, monkeypatch):
    certificate = pages.write_certificate(tmp_path, name="pictures.example")
    with pages.local_web(certificate) as secure:
        secure.serve("/secure", pages.picture(8))
        lookup = resolving("127.0.0.1", port=secure.port)
        url, other = (f"https://{name}.example:{secure.port}/secure" for name in ("pictures", "other"))
        assert cause(url, lookup=lookup) == "bad_certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(url, lookup=lookup) == pages.picture(8)
        assert cause(other, lookup=lookup) == "bad_certificate"


def test_a_server_that_speaks_no_tls_is_a_failed_connection(web):
    url = web.serve("/plain", pages.picture()).replace("http:", "https:")
    assert cause(url) == "connection_failed"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:2800:220:1::1", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("192.168.1.1", False),
        ("172.16.0.1", False),
        ("169.254.169.254", False),
        ("192.0.0.8", False),
        ("198.18.0.1", False),
        ("203.0.113.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("239.1.2.3", False),
        ("192.88.99.1", False),
        ("::127.0.0.1", False),
        ("::ffff:192.168.1.1", False),
        ("64:ff9b::c0a8:101", False),
        ("2002:7f00:1::", False),
        ("2001:0:1::", False),
        ("2001:db8::1", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("3fff::1", False),
        ("2001:4:112::1", False),
        ("ff02::1", False),
    ],
)
def test_only_global_unicast_is_of_the_open_internet(address, expected):
    import ipaddress

    assert may_connect(ipaddress.ip_address(address)) is expected
    assert may_connect(ipaddress.ip_address(address), allowed=parse_networks(["0.0.0.0/0", "::/0"]))


@pytest.mark.parametrize(
    ("given", "host", "path"),
    [
        ("http://a.example", "a.example", "/"),
        ("http://a.example/ä b?q=ü c#part", "a.example", "/%C3%A4%20b?q=%C3%BC%20c"),
        ("http://a.example/a%20b?u=http://x/", "a.example", "/a%20b?u=http://x/"),
        ("http://bücher.example/x", "xn--bcher-kva.example", "/x"),
        ("http://a.example/" + "x" * 8000, "a.example", "/" + "x" * 8000),
        (" http://a.example/x ", "a.example", "/x"),
    ],
)
def test_urls_of_lists_are_escaped_as_browsers_do(given, host, path):
    assert (parse_url(given).host, parse_url(given).path) == (host, path)


@pytest.mark.parametrize(
    "given",
    [
        "http://a.example/a\nb",
        "http://a.example/a\r\nHost: b",
        "http://a.example/\x00",
        "http://user:word@a.example/",
        "http:///x",
        "http://a b/",
        "http://" + "a" * 300 + "/",
        "http://a.example/" + "x" * 10_000,
        "http://[::1",
        "http://a.example:x/",
        "http://a.example/\udcff",
    ],
)
def test_a_url_that_could_mean_two_things_is_refused(given):
    with pytest.raises(FetchError, match="bad_url"):
        parse_url(given)


def headers_of(*lines):
    message = Message()
    for line in lines:
        name, _, value = line.partition(": ")
        message[name] = value
    return message


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
def test_what_headers_ask_of_us(lines, expected):
    found = find_opt_out(headers_of(*lines), agent="img2dataset", directives=frozenset(DIRECTIVES))
    assert found == expected


def test_an_opt_out_is_respected_on_every_hop_unless_it_is_turned_off(web):
    body = pages.picture(8)
    url = web.serve("/optout", body, X_Robots_Tag="noai")
    assert cause(url) == "opted_out"
    hop = web.answer("/hop", lambda visit: visit.say(302, Location="/fine", X_Robots_Tag="noindex"))
    web.serve("/fine", body)
    assert cause(hop) == "opted_out"
    assert fetch(url, directives=()) == body


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"II*\0" + b"\0" * 100, "not_an_image"),
        (b"%PDF-1.4", "not_an_image"),
        (pages.announcing_png(60_000, 60_000), "too_many_pixels"),
        (pages.announcing_png(0, 10), "broken_image"),
        (pages.announcing_png(10, 10)[:-12], "broken_image"),
        (pages.picture()[: len(pages.picture()) // 2], "broken_image"),
        (pages.picture(kind="WEBP")[:-20], "broken_image"),
        (b"\xff\xd8\xff", "broken_image"),
        (b"\xff\xd8\xff\xe0\xff\xff", "broken_image"),
        (b"RIFF\x04\0\0\0WEBP", "broken_image"),
        (b"GIF89a", "broken_image"),
    ],
)
def test_a_body_that_no_decoder_should_see_is_refused(web, body, expected):
    assert cause(web.serve("/body", body)) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"progressive": True}])
def test_a_header_is_read_as_pillow_reads_it(kind, options):
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(buffer, kind, **options)
    check_image(buffer.getvalue(), max_pixels=300 * 200)
    with pytest.raises(FetchError, match="too_many_pixels: 300 x 200"):
        check_image(buffer.getvalue(), max_pixels=300 * 200 - 1)


def test_causes_are_told_apart_by_their_first_word():
    assert not TRANSIENT.keys() & PERMANENT.keys()
    for word in CAUSES:
        assert cause_of(str(FetchError(word, "why: so"))) == word
    assert cause_of("anything else") == "bad_answer"
    assert len(str(FetchError("gone", "é" * 1000))) < 200
    assert str(FetchError("gone", "é\udcff")).isascii()
    with pytest.raises(ValueError, match="not one of"):
        FetchError("unknown")
