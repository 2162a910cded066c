"""URL lists to shards, by the real img2dataset, from a server that answers in every way."""

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

import local_web as pages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import in_process
from PIL import Image

from jobs import download_shards as job
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.download.downloads import TooManyFailedError, download_shards
from pipelines.download.img2dataset import DownloadError
from pipelines.download.receipts import ShardReceipt, publish_shard, read_receipts
from pipelines.download.repeated_urls import find_repeated_urls
from pipelines.download.settings import DownloadSettings, FetchLimits, FetchSettings
from pipelines.download.stage import DownloadShard, DownloadTask, to_table
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.links import list_links
from pipelines.sources.settings import LinkSettings, ShardSettings
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.settings import ImageSettings, Selection

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-img2dataset/bin/python"

real = pytest.mark.skipif(not PYTHON.exists(), reason="img2dataset is not installed: `make downloader`")

FETCHING = FetchSettings(
    python=str(PYTHON),
    image_size=32,
    threads=8,
    private_networks=("127.0.0.1/32",),
    limits=FetchLimits(seconds=2.0, tries=1, max_bytes=100_000, max_pixels=1 << 20),
)
SELECTION = Selection(min_caption_chars=4)


@pytest.fixture(scope="module")
def web():
    with pages.local_web() as web:
        yield web


def write_list(folder, rows, *, name="part-0"):
    """A list in LAION's spelling."""
    folder.mkdir(exist_ok=True)
    columns = {
        "URL": pa.array([url for url, _ in rows], pa.string()),
        "TEXT": pa.array([caption for _, caption in rows], pa.string()),
        "WIDTH": pa.array([48.0 + row for row in range(len(rows))], pa.float64()),
        "pwatermark": pa.array([0.25 if row % 2 else None for row in range(len(rows))], pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


def drip(visit):
    visit.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    visit.drip(b"a" * 100, seconds=0.1)


@pytest.fixture(scope="module")
def links(web, tmp_path_factory):
    """Rows of every fate: (URL, caption), and the cause or reason by the row's place."""
    good = [web.serve(f"/good{number}.jpg", pages.picture(number)) for number in range(6)]
    big = pages.picture(9, side=200)
    fates = [
        *((url, "a picture", "") for url in good),
        (web.serve("/big.png", pages.picture(10, side=80, kind="PNG")), "a larger picture", ""),
        (web.serve("/a b/ü.webp", pages.picture(11, kind="WEBP")), "a picture of spaces", "gone"),
        (web.redirect("/moved", "/good0.jpg"), "a moved picture", ""),
        (web.url("/missing.jpg"), "missing", "gone"),
        (web.fails_first("/flaky.jpg", pages.picture(12)), "fails at first", "server_error"),
        (web.fails_first("/busy.jpg", pages.picture(13), times=2, status=429), "busy", "too_many_requests"),
        (web.answer("/slow.jpg", drip), "a slow one", "timed_out"),
        (web.serve("/large.jpg", b"\xff\xd8\xff" + b"a" * 200_000), "too large", "too_large"),
        (web.serve("/bomb.png", pages.announcing_png(50_000, 50_000)), "a bomb", "too_many_pixels"),
        (web.serve("/page.jpg", b"<html>"), "a page", "not_an_image"),
        (web.serve("/torn.png", pages.announcing_png(8, 8)), "torn inside", "broken_image"),
        (web.serve("/no.jpg", pages.picture(14), X_Robots_Tag="noai"), "not for machines", "opted_out"),
        (web.redirect("/in.jpg", "http://169.254.169.254/latest"), "to the metadata", "private_address"),
        (web.redirect("/file.jpg", "file:///etc/passwd"), "to a file", "bad_redirect"),
        (web.answer("/reset.jpg", pages.reset), "a reset", "connection_failed"),
        ("http://10.0.0.1/a.jpg", "a private one", "private_address"),
        (good[1], "the same again", "repeated_url"),
        (web.serve("/short.jpg", big), "abc", "short_caption"),
        ("ftp://a.example/a.jpg", "another scheme", "bad_url"),
        (None, "no address", "missing_url"),
        (web.url("/uncaptioned.jpg"), None, "missing_caption"),
    ]
    web.replies["/a%20b/%C3%BC.webp"] = web.replies.pop("/a b/ü.webp")
    fates = [(url, text, "" if text == "a picture of spaces" else fate) for url, text, fate in fates]
    folder = tmp_path_factory.mktemp("lists") / "laion"
    write_list(folder, [(url, text) for url, text, _ in fates])
    return str(folder), fates


REFUSALS = {"repeated_url", "short_caption", "bad_url", "missing_url", "missing_caption"}


def settings_of(links, **changed):
    return DownloadSettings(links=links, rows_per_shard=10, fetching=FETCHING).model_copy(update=changed)


def run(links, url, **changed):
    return download_shards(settings_of(links, **changed), selection=SELECTION, url=str(url), run=in_process)


def sidecars(folder):
    return {path.stem: pq.read_table(path) for path in sorted(Path(folder).glob("[0-9]*.parquet"))}


def rows_of(folder):
    """(URL, caption, error) of every row that a shard knows."""
    rows = []
    for table in sidecars(folder).values():
        rows += zip(
            *(table.column(name).to_pylist() for name in ("url", "caption", "error_message")), strict=True
        )
    return rows


@pytest.fixture(scope="module")
def downloaded(links, tmp_path_factory):
    url = tmp_path_factory.mktemp("run") / "shards"
    return url, run(links[0], url)


@real
def test_every_row_is_a_picture_or_failed_or_refused(downloaded, links):
    url, summary = downloaded
    fates = Counter(fate for _, _, fate in links[1])
    assert summary.complete
    assert summary.rows == len(links[1])
    assert summary.downloaded == fates[""]
    assert summary.refused == {fate: fates[fate] for fate in sorted(REFUSALS)}
    assert summary.failed == {fate: fates[fate] for fate in sorted(fates) if fate and fate not in REFUSALS}
    assert json.loads((url / "_receipt.json").read_text())["failed"] == summary.failed


@real
def test_each_row_has_the_fate_that_its_server_gave_it(downloaded, links):
    found = {(link, caption): error for link, caption, error in rows_of(downloaded[0])}
    expected = {(link, caption): fate for link, caption, fate in links[1] if fate not in REFUSALS}
    assert found.keys() == expected.keys()
    for row, fate in expected.items():
        assert (found[row] or "").partition(":")[0] == fate, row


@real
def test_the_shards_are_read_as_any_others(downloaded, links):
    url, _ = downloaded
    fates = {text: fate for _, text, fate in links[1]}
    samples, rejected = {}, Counter()
    shards = list_shards(str(url))
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    for shard in shards:
        for row in read_shard(shard, ShardSettings()):
            if isinstance(row, Sample):
                samples[row.metadata["link_id"]] = row
            else:
                rejected[row.reason, row.detail.partition(":")[0]] += 1
    assert len(samples) == sum(not fate for fate in fates.values()) + 5  # "a picture" is the text of six
    assert rejected["download_failed", "private_address"] == 2
    assert rejected["resize_failed", "broken_image"] == 1
    row = samples["part-0/000000006"]
    assert (row.caption, row.metadata["WIDTH"]) == ("a larger picture", 54)
    assert (row.metadata["original_width"], row.metadata["width"], row.metadata["height"]) == (80, 32, 48)
    assert row.source_id.endswith("/big.png")
    assert Image.open(io.BytesIO(row.image)).size == (32, 48)
    assert "exif" not in row.metadata


@real
def test_latents_are_encoded_from_them_and_their_rejects_name_the_cause(
    downloaded, links, tiny_teacher, tmp_path
):
    settings = LatentsSettings(rows_per_unit=8, images=ImageSettings(min_side=8))
    table = encode_latents(
        settings,
        model=tiny_teacher,
        shards=list_shards(str(downloaded[0])),
        source="laion",
        url=str(tmp_path / "latents"),
        run=in_process,
    )
    assert table.num_rows == downloaded[1].downloaded
    details = Counter(row["detail"].partition(":")[0] for row in table.rejected_rows())
    assert details == downloaded[1].failed


@real
def test_a_run_that_is_complete_asks_for_nothing_again(downloaded, links, web):
    before, files = web.asked.total(), contents(downloaded[0])
    assert run(links[0], downloaded[0]) == downloaded[1]
    assert web.asked.total() == before
    assert contents(downloaded[0]) == files


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@real
def test_other_settings_want_another_place(downloaded, links):
    with pytest.raises(SourceError, match=r"image_size is 32 there, 64 here; give another download\.place"):
        run(links[0], downloaded[0], fetching=FETCHING.model_copy(update={"image_size": 64}))
    with pytest.raises(SourceError, match="respected"):
        run(links[0], downloaded[0], fetching=FETCHING.model_copy(update={"respected": ()}))


@real
def test_retries_ask_for_what_may_have_passed_and_nothing_else(web, tmp_path):
    again = [
        web.fails_first("/again1.jpg", pages.picture(21)),
        web.fails_first("/again2.jpg", pages.picture(22), times=2, status=429),
        web.answer("/again3.jpg", pages.reset),
    ]
    once = [
        web.serve("/once1.jpg", pages.picture(23)),
        web.url("/once2.jpg"),
        web.serve("/once3.jpg", b"<html>"),
        web.serve("/once4.jpg", pages.picture(24), X_Robots_Tag="noai"),
        "http://10.0.0.1/once5.jpg",
    ]
    links = write_list(tmp_path / "lists", [(url, "a picture") for url in again + once])
    shards = tmp_path / "shards"
    first = run(links, shards)
    assert (first.downloaded, first.transient) == (1, 3)
    before = web.asked.copy()
    second = run(links, shards, retry_rounds=1)
    assert web.asked - before == {f"/again{number}.jpg": 1 for number in (1, 2, 3)}
    assert (second.downloaded, second.transient) == (2, 2)
    third = run(links, shards, retry_rounds=2)
    assert third.retried == [{"rows": 3, "downloaded": 1}, {"rows": 2, "downloaded": 1}]
    permanent = {"gone": 1, "not_an_image": 1, "opted_out": 1, "private_address": 1}
    assert third.failed == {**permanent, "connection_failed": 1}
    for summary in (first, second, third):
        assert summary.rows == summary.downloaded + sum(summary.failed.values()) == 8
    assert {shard.name for shard in list_shards(str(shards))} == {"00000", "00000-r1", "00000-r2"}
    parents = dict(
        zip(
            *(sidecars(shards)["00000-r1"].column(name).to_pylist() for name in ("url", "retry_of")),
            strict=True,
        )
    )
    assert parents == {url: f"00000/00000{place}" for place, url in enumerate(again)}
    pictures = [link for link, _, error in rows_of(shards) if error is None]
    assert sorted(pictures) == sorted([again[0], again[1], once[0]])
    ids = {name: set(table.column("link_id").to_pylist()) for name, table in sidecars(shards).items()}
    assert ids["00000-r2"] < ids["00000-r1"] < ids["00000"]


class Forgets:
    """A veto on one URL."""

    def __init__(self, url):
        self.url = url

    def check_link(self, link):
        if link.url == self.url:
            raise Rejected("withheld")

    def describe(self):
        return {}


def test_what_is_to_be_forgotten_is_not_asked_for_nor_tried_again(tmp_path):
    urls = ["http://a.example/0", "http://a.example/1"]
    links = write_list(tmp_path / "lists", [(url, "a picture") for url in urls])
    fetching = fake(tmp_path, "exit 1")
    options = {"selection": SELECTION, "url": str(tmp_path / "shards"), "run": in_process}
    first = download_shards(settings_of(links, fetching=fetching), vetoes=[Forgets(urls[0])], **options)
    assert (first.refused, first.failed) == ({"withheld": 1}, {"interrupted": 1})
    again = settings_of(links, fetching=fetching, retry_rounds=1)
    second = download_shards(again, vetoes=[Forgets(urls[1])], **options)
    assert (second.refused, second.failed, second.rows) == ({"withheld": 2}, {}, 2)
    assert len(list_shards(str(tmp_path / "shards"))) == 1


@real
def test_opt_outs_that_are_not_respected_are_recorded(web, tmp_path):
    url = web.serve("/noai.jpg", pages.picture(20), X_Robots_Tag="noai")
    links = write_list(tmp_path / "lists", [(url, "a picture")])
    fetching = FETCHING.model_copy(update={"respected": ()})
    assert run(links, tmp_path / "shards", fetching=fetching).downloaded == 1
    assert read_receipts(str(tmp_path / "shards"))["00000"].settings["respected"] == []
    assert "(img2dataset" not in web.headers["User-Agent"]
    assert "img2dataset" in web.headers["User-Agent"]


@real
def test_killed_at_any_time_and_run_again_it_ends_with_the_same_rows(web, tmp_path):
    """The process is killed while the second shard waits for a slow server."""
    waits = []

    def slow(visit):
        waits.append(1)
        time.sleep(1.0 if len(waits) < 3 else 0.0)
        visit.say(200, pages.picture(30))

    rows = [(web.serve(f"/kill{number}.jpg", pages.picture(number)), "a picture") for number in range(12)]
    rows[5] = (web.answer("/killslow.jpg", slow), "a picture")
    links = write_list(tmp_path / "lists", rows)
    shards = tmp_path / "shards"
    program = Path(__file__).with_name("download_killed.py")
    arguments = [sys.executable, str(program), links, str(shards), str(PYTHON)]
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/pipelines")]
    process = subprocess.Popen(
        arguments, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 60
    while not waits and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in shards.glob("*.tar")] == ["00000.tar"]
    first = (shards / "00000.tar").read_bytes()
    before = web.asked.copy()
    summary = run(links, shards, rows_per_shard=4)
    assert (summary.downloaded, summary.failed) == (12, {})
    assert (shards / "00000.tar").read_bytes() == first
    assert web.asked["/kill0.jpg"] == before["/kill0.jpg"]
    assert sorted(link for link, _, _ in rows_of(shards)) == sorted(url for url, _ in rows)
    assert not (shards / "_staging").exists()
    # What the killed one left on the local disk is cleaned up by its orphan.
    while list(tmp_path.glob("img2dataset-*/work")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@real
def test_a_picture_that_takes_the_decoder_down_costs_its_row_alone(web, tmp_path):
    """Its bytes make the test's decoder hang; the process is ended, and the shard made without it."""
    poison = pages.picture(66)
    rows = [(web.serve(f"/p{number}.jpg", pages.picture(number)), "a picture") for number in range(3)]
    rows.append((web.serve("/poison.jpg", poison), "a picture"))
    links = write_list(tmp_path / "lists", rows)
    python = hanging_on(poison, tmp_path)
    limits = FETCHING.limits.model_copy(update={"decode_seconds": 0.5})
    fetching = FETCHING.model_copy(update={"python": str(python), "limits": limits})
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
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec {PYTHON} "$@"\n')
    python.chmod(0o755)
    return python


def fake(folder, script, *, starts=True):
    """An interpreter that does this in place of img2dataset; it says one step of progress if it `starts`."""
    python = folder / "python"
    step = "{ printf '\\001'; head -c 39 /dev/zero; } > $4/progress" if starts else ""
    python.write_text(f"#!/bin/sh\n{step}\n{script}\n")
    python.chmod(0o755)
    return FETCHING.model_copy(update={"python": str(python)})


def test_what_img2dataset_cannot_do_is_accounted_as_failed(tmp_path):
    links = write_list(tmp_path / "lists", [(f"http://a.example/{row}", "a picture") for row in range(3)])
    summary = run(links, tmp_path / "shards", fetching=fake(tmp_path, "echo broken; exit 3"))
    assert summary.failed == {"interrupted": 3}
    assert {error for _, _, error in rows_of(tmp_path / "shards")} == {"interrupted: exit status 3: broken"}
    (shard,) = list_shards(str(tmp_path / "shards"))
    assert [row.reason for row in read_shard(shard, ShardSettings())] == ["download_failed"] * 3


def test_a_process_that_stands_still_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.download.img2dataset._LOOKUP_SECONDS", 0.0)
    limits = FetchLimits(seconds=0.1, tries=1, decode_seconds=0.1)
    fetching = fake(tmp_path, "exec sleep 60").model_copy(update={"limits": limits})
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")])
    began = time.monotonic()
    assert run(links, tmp_path / "shards", fetching=fetching).failed == {"interrupted": 1}
    assert time.monotonic() - began < 10


def test_it_is_given_no_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")])
    run(links, tmp_path / "shards", fetching=fake(tmp_path, f"env > {tmp_path}/env; exit 1"))
    given = (tmp_path / "env").read_text()
    assert "OPENCV_IO_MAX_IMAGE_PIXELS=1048576" in given
    assert not any(word in given for word in ("secret", "token", "proxy"))


def test_an_interpreter_that_is_not_there_is_said(tmp_path):
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")])
    fetching = FETCHING.model_copy(update={"python": str(tmp_path / "none")})
    with pytest.raises(DownloadError, match="make downloader"):
        run(links, tmp_path / "shards", fetching=fetching)


def test_an_environment_in_which_img2dataset_does_not_start_costs_no_row(tmp_path, monkeypatch):
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")])
    fetching = fake(tmp_path, "echo no cv2; exit 1", starts=False)
    with pytest.raises(DownloadError, match=r"does not start with .*python \(exit status 1: no cv2\)"):
        run(links, tmp_path / "shards", fetching=fetching)
    assert read_receipts(str(tmp_path / "shards")) == {}


def test_more_failures_than_the_bound_stop_the_job_and_say_why(tmp_path):
    links = write_list(tmp_path / "lists", [(f"http://a.example/{row}", "a picture") for row in range(30)])
    fetching = fake(tmp_path, "exit 1")
    bound = {"fetching": fetching, "judged_after": 20, "max_failed": 0.5}
    with pytest.raises(
        TooManyFailedError, match=r"20 of 20 rows failed \(20 interrupted\), more than the bound"
    ):
        run(links, tmp_path / "shards", **bound)
    assert len(read_receipts(str(tmp_path / "shards"))) == 2


def test_shards_from_elsewhere_are_left_alone(tmp_path):
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000.tar").touch()
    with pytest.raises(SourceError, match="came from elsewhere"):
        run(links, tmp_path / "shards")


def test_rows_that_are_all_refused_leave_a_receipt_and_no_shard(tmp_path):
    links = write_list(tmp_path / "lists", [("http://a.example/", "abc"), (None, "a picture")])
    summary = run(links, tmp_path / "shards")
    assert (summary.rows, summary.shards, summary.complete) == (2, 0, True)
    assert summary.refused == {"missing_url": 1, "short_caption": 1}
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_the_first_of_equal_urls_counts_over_all_lists():
    urls = ["a", "b", " a ", None, "c", "", "b", b"\xff", b"\xff", None, "A"]
    assert find_repeated_urls(urls).tolist() == [2, 6, 8]
    assert find_repeated_urls([]).tolist() == []


def test_repeats_are_found_when_not_all_urls_fit_into_memory(monkeypatch):
    monkeypatch.setattr("pipelines.download.repeated_urls._ROWS_IN_MEMORY", 100)
    urls = [f"http://a.example/{row * row % 1009}" for row in range(3000)]
    expected = [row for row, url in enumerate(urls) if url in urls[:row]]
    assert find_repeated_urls(urls).tolist() == expected


def receipt_of(**changed):
    values = {"name": "00000", "number": 0, "retry": 0, "source": "a", "start": 0, "stop": 2, "rows": 2}
    return ShardReceipt(**{**values, "refused": {}, "downloaded": 2, **changed})


def shard_files(folder, content):
    folder.mkdir()
    files = {ending: folder / f"x{ending}" for ending in (".parquet", "_stats.json", ".tar")}
    for file in files.values():
        file.write_text(content)
    return files


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_of_two_attempts_at_a_shard_one_counts_whole(tmp_path, store):
    import fsspec

    url = str(tmp_path / "shards") if store == "disk" else f"memory://{tmp_path.name}"
    won = publish_shard(receipt_of(), shard_files(tmp_path / "one", "one"), url=url)
    lost = publish_shard(
        receipt_of(downloaded=1, failed={"gone": 1}), shard_files(tmp_path / "two", "two"), url=url
    )
    assert lost == won == read_receipts(url)["00000"]
    for ending in (".parquet", "_stats.json", ".tar"):
        with fsspec.open(f"{url}/00000{ending}") as file:
            assert file.read() == b"one"
    assert fsspec.core.url_to_fs(url)[0].find(f"{url}/_staging") == []


def test_an_attempt_that_was_killed_while_its_files_moved_is_finished_by_the_next(tmp_path, monkeypatch):
    from pipelines.download import receipts as published

    url, moved = str(tmp_path / "shards"), []

    def killed_before_the_tar(place, to):
        if to.endswith(".tar"):
            raise KeyboardInterrupt
        moved.append(to)
        published_move(place, to)

    published_move = published.move_object
    monkeypatch.setattr(published, "move_object", killed_before_the_tar)
    with pytest.raises(KeyboardInterrupt):
        publish_shard(receipt_of(), shard_files(tmp_path / "one", "one"), url=url)
    monkeypatch.undo()
    assert len(moved) == 2
    assert not Path(f"{url}/00000.tar").exists()
    part = DownloadTask(
        number=0, links=list_links(write_list(tmp_path / "l", [("http://a/", "b")]))[0], start=0, stop=2
    )
    stage = DownloadShard(
        url=url, rows_per_shard=2, columns=LinkSettings(), selection=SELECTION, vetoes=(), fetching=FETCHING
    )
    assert stage(part) == read_receipts(url)["00000"]
    assert Path(f"{url}/00000.tar").read_text() == "one"


def test_a_receipt_accounts_for_every_row():
    with pytest.raises(ValueError, match="2 rows, but 1 refused, 2 downloaded and 0 failed"):
        receipt_of(refused={"unsafe": 1})
    assert receipt_of(downloaded=0, failed={"gone": 1, "timed_out": 1}).transient == 1


def test_columns_that_json_does_not_know_become_text():
    import datetime

    from pipelines.sources.links import Link

    link = Link(id="a/0", ordinal=0, url="http://a/", caption="b", metadata={})
    days = [datetime.date(2020, 1, 2), None]
    mixed = [1, "two"]
    rows = [
        replace(link, metadata={"day": day, "mixed": value, "width": 3, "all": [0.5, 1.5]})
        for day, value in zip(days, mixed, strict=True)
    ]
    table = to_table(rows)
    assert table.column("day").to_pylist() == ["2020-01-02", None]
    assert table.column("mixed").to_pylist() == ["1", "two"]
    assert table.column("all").to_pylist() == [[0.5, 1.5]] * 2
    assert "width" not in table.column_names


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 network"):
        FetchSettings(private_networks=("here",))
    with pytest.raises(ValueError, match="user_agent_token"):
        FetchSettings(user_agent_token="a\r\nb")


def test_a_dry_run_says_how_much_there_is(tmp_path, capsys):
    links = write_list(tmp_path / "lists", [("http://a.example/", "a picture")] * 25)
    options = ["--set", f"download.links={links}", "--set", "download.rows_per_shard=10"]
    assert job.main([*options, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would download the pictures of 25 rows in 1 lists" in said
    assert "3 shards, of which 0 have their receipt; 25 rows are left" in said
    assert not (tmp_path / "run").exists()


def test_without_lists_the_job_says_what_to_give(tmp_path, capsys):
    assert job.main(["--out", str(tmp_path)]) == 2
    assert "download.links is not set" in capsys.readouterr().err
