"""URL lists to shards with the real img2dataset, from a server that misbehaves in every way."""

import datetime
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import local_web as pages
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import in_process
from PIL import Image

from jobs import download_shards as job
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.download import receipts as receipts_module
from pipelines.download.downloads import TooManyFailedError, download_shards
from pipelines.download.img2dataset import DownloadError
from pipelines.download.receipts import ShardReceipt, publish_shard, read_receipts
from pipelines.download.repeated_urls import find_repeated_urls
from pipelines.download.settings import DownloadSettings, FetchLimits, FetchSettings
from pipelines.download.stage import DownloadShard, ShardTask, links_to_table
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.links import Link, list_links
from pipelines.sources.settings import ShardSettings
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.settings import ImageSettings, Selection

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-img2dataset/bin/python"

real = pytest.mark.skipif(not PYTHON.exists(), reason="img2dataset is not installed: `make downloader`")

LIMITS = FetchLimits(seconds=2.0, tries=1, max_bytes=100_000, max_pixels=1 << 20)
LOCAL = {"private_networks": ("127.0.0.1/32",)}
FETCHING = FetchSettings(python=str(PYTHON), image_size=32, threads=8, limits=LIMITS, **LOCAL)
SELECTION = Selection(min_caption_chars=4)
REFUSALS = {"repeated_url", "short_caption", "bad_url", "missing_url", "missing_caption"}


@pytest.fixture(scope="module")
def web():
    with pages.local_web() as web:
        yield web


def write_list(folder, rows):
    """A list in LAION's spelling, of URLs, or of URLs and captions."""
    folder.mkdir(exist_ok=True)
    rows = [row if isinstance(row, tuple) else (row, "an image") for row in rows]
    urls, captions = (pa.array(column, pa.string()) for column in zip(*rows, strict=True))
    marks = pa.array([0.25 if row % 2 else None for row in range(len(rows))], pa.float32())
    columns = {"URL": urls, "TEXT": captions, "WIDTH": np.arange(48.0, 48.0 + len(rows)), "pwatermark": marks}
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    return str(folder)


@pytest.fixture
def unreachable(tmp_path):
    """A function that writes a list of so many URLs that no test requests."""
    return lambda count=1: write_list(tmp_path / "lists", [f"http://a.example/{n}" for n in range(count)])


def drip(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    visit.drip(b"a" * 100, seconds=0.1)


@pytest.fixture(scope="module")
def links(web, tmp_path_factory):
    """A list with rows of every fate; and of each its URL, caption, and cause or reason of failure."""
    good = [web.serve(f"/good{number}.jpg", pages.image(number)) for number in range(6)]
    rows = [
        *((url, "an image", "") for url in good),
        (web.serve("/big.png", pages.image(10, side=80, kind="PNG")), "a larger image", ""),
        (web.serve("/a b/ü.webp", pages.image(11, kind="WEBP")), "a URL with spaces", ""),
        (web.redirect("/moved", "/good0.jpg"), "a moved image", ""),
        (web.url("/missing.jpg"), "missing", "gone"),
        (web.fails_first("/flaky.jpg", pages.image(12)), "fails at first", "server_error"),
        (web.fails_first("/busy.jpg", pages.image(13), times=2, status=429), "busy", "too_many_requests"),
        (web.answer("/slow.jpg", drip), "a slow one", "timed_out"),
        (web.serve("/large.jpg", b"\xff\xd8\xff" + b"a" * 200_000), "too large", "too_large"),
        (web.serve("/bomb.png", pages.png_of_size(50_000, 50_000)), "a bomb", "too_many_pixels"),
        (web.serve("/page.jpg", b"<html>"), "a page", "not_an_image"),
        (web.serve("/torn.png", pages.png_of_size(8, 8)), "torn inside", "broken_image"),
        (web.serve("/no.jpg", pages.image(14), X_Robots_Tag="noai"), "not for machines", "opted_out"),
        (web.redirect("/in.jpg", "http://169.254.169.254/latest"), "to the metadata", "private_address"),
        (web.redirect("/file.jpg", "file:///etc/passwd"), "to a file", "bad_redirect"),
        (web.answer("/reset.jpg", pages.reset), "a reset", "connection_failed"),
        ("http://10.0.0.1/a.jpg", "a private one", "private_address"),
        (good[1], "the same again", "repeated_url"),
        (web.serve("/short.jpg", pages.image(9, side=200)), "abc", "short_caption"),
        ("ftp://a.example/a.jpg", "another scheme", "bad_url"),
        (None, "no URL", "missing_url"),
        (web.url("/uncaptioned.jpg"), None, "missing_caption"),
    ]
    web.replies["/a%20b/%C3%BC.webp"] = web.replies.pop("/a b/ü.webp")
    folder = tmp_path_factory.mktemp("lists") / "laion"
    return write_list(folder, [(url, caption) for url, caption, _ in rows]), rows


def run(links, url, *, filters=(), fetching=FETCHING, **changed):
    settings = DownloadSettings(links=links, rows_per_shard=10, fetching=fetching).model_copy(update=changed)
    return download_shards(settings, selection=SELECTION, url=str(url), filters=filters, run=in_process)


def fetching_with(**changed):
    return FETCHING.model_copy(update=changed)


def sidecars(folder):
    return {path.stem: pq.read_table(path) for path in sorted(Path(folder).glob("[0-9]*.parquet"))}


def rows_of(folder):
    """(URL, caption, error) of every row that a shard lists."""
    tables = (table.select(["url", "caption", "error_message"]) for table in sidecars(folder).values())
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


@pytest.fixture(scope="module")
def downloaded(links, tmp_path_factory):
    url = tmp_path_factory.mktemp("run") / "shards"
    return url, run(links[0], url)


@real
def test_every_row_is_downloaded_failed_or_refused(downloaded, links):
    url, summary = downloaded
    fates = Counter(fate for _, _, fate in links[1])
    assert summary.complete
    assert (summary.rows, summary.downloaded) == (len(links[1]), fates[""])
    assert summary.refused == {fate: fates[fate] for fate in sorted(REFUSALS)}
    assert summary.failed == {fate: fates[fate] for fate in sorted(fates) if fate and fate not in REFUSALS}
    assert json.loads((url / "_receipt.json").read_text())["failed"] == summary.failed
    found = {(link, caption): (error or "").partition(":")[0] for link, caption, error in rows_of(url)}
    assert found == {(link, caption): fate for link, caption, fate in links[1] if fate not in REFUSALS}


@real
def test_downloaded_shards_are_read_like_others(downloaded, links):
    samples, rejected = {}, Counter()
    shards = list_shards(str(downloaded[0]))
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    for shard in shards:
        for row in read_shard(shard, ShardSettings()):
            if isinstance(row, Sample):
                samples[row.metadata["link_id"]] = row
            else:
                rejected[row.reason, row.detail.partition(":")[0]] += 1
    assert len(samples) == sum(not fate for _, _, fate in links[1])
    assert rejected["download_failed", "private_address"] == 2
    assert rejected["resize_failed", "broken_image"] == 1
    row = samples["part-0/000000006"]
    assert (row.caption, row.metadata["WIDTH"]) == ("a larger image", 54)
    assert (row.metadata["original_width"], row.metadata["width"], row.metadata["height"]) == (80, 32, 48)
    assert row.source_id.endswith("/big.png")
    assert Image.open(io.BytesIO(row.image)).size == (32, 48)
    assert "exif" not in row.metadata


@real
def test_rejections_of_latents_name_the_cause(downloaded, tiny_teacher, tmp_path):
    table = encode_latents(
        LatentsSettings(rows_per_unit=8, images=ImageSettings(min_side=8)),
        model=tiny_teacher,
        shards=list_shards(str(downloaded[0])),
        source="laion",
        url=str(tmp_path / "latents"),
        run=in_process,
    )
    assert table.num_rows == downloaded[1].downloaded
    assert Counter(row["detail"].partition(":")[0] for row in table.rejected_rows()) == downloaded[1].failed


@real
def test_a_complete_run_requests_nothing_again(downloaded, links, web):
    def contents():
        return {path.name: path.read_bytes() for path in downloaded[0].rglob("*") if path.is_file()}

    before, files = web.requests.total(), contents()
    assert run(links[0], downloaded[0]) == downloaded[1]
    assert (web.requests.total(), contents()) == (before, files)


@real
@pytest.mark.parametrize(
    ("changed", "message"),
    [({"image_size": 64}, r"image_size is 32 there, 64 here"), ({"respected": ()}, "respected")],
)
def test_other_settings_need_another_folder(downloaded, links, changed, message):
    with pytest.raises(SourceError, match=rf"{message}.*download\.folder"):
        run(links[0], downloaded[0], fetching=fetching_with(**changed))


@real
def test_only_transient_failures_are_retried(web, tmp_path):
    again = [
        web.fails_first("/again1.jpg", pages.image(21)),
        web.fails_first("/again2.jpg", pages.image(22), times=2, status=429),
        web.answer("/again3.jpg", pages.reset),
    ]
    once = [
        web.serve("/once1.jpg", pages.image(23)),
        web.url("/once2.jpg"),
        web.serve("/once3.jpg", b"<html>"),
        web.serve("/once4.jpg", pages.image(24), X_Robots_Tag="noai"),
        "http://10.0.0.1/once5.jpg",
    ]
    links, shards = write_list(tmp_path / "lists", again + once), tmp_path / "shards"
    first = run(links, shards)
    assert (first.downloaded, first.transient) == (1, 3)
    before = web.requests.copy()
    second = run(links, shards, retry_rounds=1)
    assert web.requests - before == {f"/again{number}.jpg": 1 for number in (1, 2, 3)}
    assert (second.downloaded, second.transient) == (2, 2)
    third = run(links, shards, retry_rounds=2)
    assert third.retried == [{"rows": 3, "downloaded": 1}, {"rows": 2, "downloaded": 1}]
    permanent = {"gone": 1, "not_an_image": 1, "opted_out": 1, "private_address": 1}
    assert third.failed == {**permanent, "connection_failed": 1}
    for summary in (first, second, third):
        assert summary.rows == summary.downloaded + sum(summary.failed.values()) == 8
    tables = sidecars(shards)
    assert {shard.name for shard in list_shards(str(shards))} == {"00000", "00000-r1", "00000-r2"}
    retried = {row["url"]: row["retry_of"] for row in tables["00000-r1"].to_pylist()}
    assert retried == {url: f"00000/00000{row}" for row, url in enumerate(again)}
    images = [link for link, _, error in rows_of(shards) if error is None]
    assert sorted(images) == sorted([again[0], again[1], once[0]])
    ids = {name: set(table.column("link_id").to_pylist()) for name, table in tables.items()}
    assert ids["00000-r2"] < ids["00000-r1"] < ids["00000"]


class DeletedUrl:
    """A filter that refuses one URL."""

    def __init__(self, url):
        self.url = url

    def check_link(self, link):
        if link.url == self.url:
            raise Rejected("withheld")

    def describe(self):
        return {}


def test_deleted_rows_are_neither_requested_nor_retried(tmp_path, unreachable):
    links, shards, fetching = unreachable(2), tmp_path / "shards", fake(tmp_path, "exit 1")
    first = run(links, shards, fetching=fetching, filters=[DeletedUrl("http://a.example/0")])
    assert (first.refused, first.failed) == ({"withheld": 1}, {"interrupted": 1})
    deleted = [DeletedUrl("http://a.example/1")]
    second = run(links, shards, fetching=fetching, retry_rounds=1, filters=deleted)
    assert (second.refused, second.failed, second.rows) == ({"withheld": 2}, {}, 2)
    assert len(list_shards(str(shards))) == 1


@real
def test_ignored_opt_outs_are_recorded(web, tmp_path):
    links = write_list(tmp_path / "lists", [web.serve("/noai.jpg", pages.image(20), X_Robots_Tag="noai")])
    assert run(links, tmp_path / "shards", fetching=fetching_with(respected=())).downloaded == 1
    assert read_receipts(str(tmp_path / "shards"))["00000"].settings["respected"] == []
    assert "(img2dataset" not in web.headers["User-Agent"]
    assert "img2dataset" in web.headers["User-Agent"]


@real
def test_a_killed_download_continues_to_the_same_rows(web, tmp_path):
    """The process is killed while the second shard waits for a slow server."""
    waits = []

    def slow(visit):
        waits.append(1)
        time.sleep(1.0 if len(waits) < 3 else 0.0)
        visit.say(200, pages.image(30))

    urls = [web.serve(f"/kill{number}.jpg", pages.image(number)) for number in range(12)]
    urls[5] = web.answer("/killslow.jpg", slow)
    links, shards = write_list(tmp_path / "lists", urls), tmp_path / "shards"
    program = "import sys, test_downloads as tests; tests.run(*sys.argv[1:], rows_per_shard=4)"
    command = [sys.executable, "-c", program, links, str(shards)]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 60
    while not waits and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in shards.glob("*.tar")] == ["00000.tar"]
    first, before = (shards / "00000.tar").read_bytes(), web.requests["/kill0.jpg"]
    summary = run(links, shards, rows_per_shard=4)
    assert (summary.downloaded, summary.failed) == (12, {})
    assert (shards / "00000.tar").read_bytes() == first
    assert web.requests["/kill0.jpg"] == before
    assert sorted(link for link, _, _ in rows_of(shards)) == sorted(urls)
    assert not (shards / "_staging").exists()
    # The orphaned program removes the killed one's temporary files.
    while list(tmp_path.glob("img2dataset-*/work")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@real
def test_an_image_that_hangs_costs_its_row(web, tmp_path):
    """The process is killed, and the shard made without the image on whose bytes it hangs."""
    bodies = [*map(pages.image, range(3)), pages.image(66)]
    links = write_list(tmp_path / "lists", [web.serve(f"/p{n}.jpg", body) for n, body in enumerate(bodies)])
    limits = LIMITS.model_copy(update={"decode_seconds": 0.5})
    fetching = fetching_with(python=str(hanging_on(bodies[3], tmp_path)), limits=limits)
    summary = run(links, tmp_path / "shards", fetching=fetching)
    assert (summary.downloaded, summary.failed) == (3, {"crashed": 1})


def hanging_on(poison, folder):
    """An interpreter in which OpenCV hangs on these bytes."""
    site = folder / "site"
    site.mkdir()
    (folder / "poison").write_bytes(poison)
    (site / "sitecustomize.py").write_text(
        "import time, cv2\n"
        f"poison = open({str(folder / 'poison')!r}, 'rb').read()\n"
        "decode = cv2.imdecode\n"
        "def imdecode(data, flags):\n"
        "    while data.tobytes() == poison: time.sleep(1)\n"
        "    return decode(data, flags)\n"
        "cv2.imdecode = imdecode\n"
    )
    return script(folder, f'PYTHONPATH="$PYTHONPATH:{site}" exec {PYTHON} "$@"')


def script(folder, text):
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    return python


def fake(folder, text, *, starts=True):
    """Settings with a script in place of img2dataset; it reports one step of progress if it `starts`."""
    step = "{ printf '\\001'; head -c 39 /dev/zero; } > $4/progress" if starts else ""
    return fetching_with(python=str(script(folder, f"{step}\n{text}")))


def test_rows_of_a_failing_process_are_failed(tmp_path, unreachable):
    summary = run(unreachable(3), tmp_path / "shards", fetching=fake(tmp_path, "echo broken; exit 3"))
    assert summary.failed == {"interrupted": 3}
    assert {error for _, _, error in rows_of(tmp_path / "shards")} == {"interrupted: exit status 3: broken"}
    (shard,) = list_shards(str(tmp_path / "shards"))
    assert [row.reason for row in read_shard(shard, ShardSettings())] == ["download_failed"] * 3


def test_a_stalled_process_is_killed(tmp_path, unreachable, monkeypatch):
    monkeypatch.setattr("pipelines.download.img2dataset._LOOKUP_SECONDS", 0.0)
    limits = FetchLimits(seconds=0.1, tries=1, decode_seconds=0.1)
    fetching = fake(tmp_path, "exec sleep 60").model_copy(update={"limits": limits})
    began = time.monotonic()
    assert run(unreachable(), tmp_path / "shards", fetching=fetching).failed == {"interrupted": 1}
    assert time.monotonic() - began < 10


def test_the_process_inherits_no_credentials(tmp_path, unreachable, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    run(unreachable(), tmp_path / "shards", fetching=fake(tmp_path, f"env > {tmp_path}/env; exit 1"))
    environment = (tmp_path / "env").read_text()
    assert "OPENCV_IO_MAX_IMAGE_PIXELS=1048576" in environment
    assert not any(word in environment for word in ("secret", "token", "proxy"))


def test_a_missing_interpreter_is_named(tmp_path, unreachable):
    with pytest.raises(DownloadError, match="make downloader"):
        run(unreachable(), tmp_path / "shards", fetching=fetching_with(python=str(tmp_path / "none")))


def test_a_broken_environment_costs_no_row(tmp_path, unreachable):
    fetching = fake(tmp_path, "echo no cv2; exit 1", starts=False)
    with pytest.raises(DownloadError, match=r"python \(exit status 1: no cv2\)"):
        run(unreachable(), tmp_path / "shards", fetching=fetching)
    assert read_receipts(str(tmp_path / "shards")) == {}


def test_too_many_failures_stop_the_job(tmp_path, unreachable):
    bound = {"fetching": fake(tmp_path, "exit 1"), "judged_after": 20, "max_failed": 0.5}
    with pytest.raises(TooManyFailedError, match=r"20 of 20 rows failed \(20 interrupted\)"):
        run(unreachable(30), tmp_path / "shards", **bound)
    assert len(read_receipts(str(tmp_path / "shards"))) == 2


def test_foreign_shards_are_left_alone(tmp_path, unreachable):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").touch()
    with pytest.raises(SourceError, match=r"download\.folder"):
        run(unreachable(), tmp_path / "shards")


def test_refused_rows_leave_a_receipt_only(tmp_path):
    summary = run(write_list(tmp_path / "lists", [("http://a.example/", "abc"), None]), tmp_path / "shards")
    assert (summary.rows, summary.shards, summary.complete) == (2, 0, True)
    assert summary.refused == {"missing_url": 1, "short_caption": 1}
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_the_first_of_equal_urls_counts():
    urls = ["a", "b", " a ", None, "c", "", "b", b"\xff", b"\xff", None, "A"]
    assert find_repeated_urls(urls).tolist() == [2, 6, 8]
    assert find_repeated_urls([]).tolist() == []


def test_repeated_urls_are_found_beyond_memory(monkeypatch):
    monkeypatch.setattr("pipelines.download.repeated_urls._ROWS_IN_MEMORY", 100)
    urls = [f"http://a.example/{row * row % 1009}" for row in range(3000)]
    assert find_repeated_urls(urls).tolist() == [row for row, url in enumerate(urls) if url in urls[:row]]


def receipt_of(**changed):
    values = {"name": "00000", "number": 0, "retry": 0, "source": "a", "start": 0, "stop": 2, "rows": 2}
    return ShardReceipt(**{**values, "refused": {}, "downloaded": 2, **changed})


def shard_files(folder, content):
    folder.mkdir()
    files = {suffix: folder / f"x{suffix}" for suffix in receipts_module.SHARD_SUFFIXES}
    for file in files.values():
        file.write_text(content)
    return files


@pytest.mark.parametrize("store", ["disk", "memory", "s3"])
def test_one_of_two_attempts_counts_whole(tmp_path, store, request):
    url = {"disk": str(tmp_path / "shards"), "memory": f"memory://{tmp_path.name}"}.get(store)
    url = url or f"{request.getfixturevalue('bucket')}/downloads"
    first = publish_shard(receipt_of(), shard_files(tmp_path / "one", "one"), url=url)
    other = receipt_of(downloaded=1, failed={"gone": 1})
    second = publish_shard(other, shard_files(tmp_path / "two", "two"), url=url)
    assert second == first == read_receipts(url)["00000"]
    for suffix in receipts_module.SHARD_SUFFIXES:
        with fsspec.open(f"{url}/00000{suffix}") as file:
            assert file.read() == b"one"
    filesystem, _ = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    assert filesystem.find(f"{url}/_staging") == []
    assert [shard.name for shard in list_shards(url)] == ["00000"]


def test_a_killed_publication_is_finished(tmp_path, monkeypatch):
    url, moved, move = str(tmp_path / "shards"), [], receipts_module.move_object

    def killed_before_the_tar(source, target):
        if target.endswith(".tar"):
            raise KeyboardInterrupt
        moved.append(target)
        move(source, target)

    monkeypatch.setattr(receipts_module, "move_object", killed_before_the_tar)
    with pytest.raises(KeyboardInterrupt):
        publish_shard(receipt_of(), shard_files(tmp_path / "one", "one"), url=url)
    monkeypatch.undo()
    assert len(moved) == 2
    assert not Path(f"{url}/00000.tar").exists()
    links = list_links(write_list(tmp_path / "list", ["http://a/"]))[0]
    settings = DownloadSettings(rows_per_shard=2, fetching=FETCHING)
    stage = DownloadShard(url=url, settings=settings, selection=SELECTION, filters=())
    assert stage(ShardTask(number=0, links=links, start=0, stop=2)) == read_receipts(url)["00000"]
    assert Path(f"{url}/00000.tar").read_text() == "one"


def test_a_receipt_accounts_for_every_row():
    with pytest.raises(ValueError, match="2 rows, but 1 refused, 2 downloaded and 0 failed"):
        receipt_of(refused={"unsafe": 1})
    assert receipt_of(downloaded=0, failed={"gone": 1, "timed_out": 1}).transient == 1


def test_columns_outside_json_become_text():
    link = Link(id="a/0", ordinal=0, url="http://a/", caption="b", metadata={})
    common = {"width": 3, "all": [0.5, 1.5]}
    rows = [{"day": datetime.date(2020, 1, 2), "mixed": 1}, {"day": None, "mixed": "two"}]
    table = links_to_table([replace(link, metadata=row | common) for row in rows])
    assert table.column("day").to_pylist() == ["2020-01-02", None]
    assert table.column("mixed").to_pylist() == ["1", "two"]
    assert table.column("all").to_pylist() == [[0.5, 1.5]] * 2
    assert "width" not in table.column_names


@pytest.mark.parametrize("wrong", [{"private_networks": ("here",)}, {"user_agent_token": "a\r\nb"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FetchSettings(**wrong)


def test_a_dry_run_counts_rows_and_shards(tmp_path, unreachable, capsys):
    options = ["--set", f"download.links={unreachable(25)}", "--set", "download.rows_per_shard=10"]
    assert job.main([*options, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("25 rows in 1 lists", "3 shards, 0 ", "25 rows are left"))
    assert not (tmp_path / "run").exists()


def test_missing_lists_are_named(tmp_path, capsys):
    assert job.main(["--out", str(tmp_path)]) == 2
    assert "download.links" in capsys.readouterr().err
