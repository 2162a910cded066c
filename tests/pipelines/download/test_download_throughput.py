"""The cost of guard, selection and receipts, compared with img2dataset alone in the same minute."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import in_process

from pipelines.download.downloads import download_shards
from pipelines.download.settings import DownloadSettings, FetchSettings
from pipelines.stages.settings import Selection

PYTHON = Path(__file__).parents[3] / ".venv-img2dataset/bin/python"
ROWS = 2000
THREADS = 32
SIDE = 512
SERVER = """
import sys
sys.path[:0] = sys.argv[1:]
import local_web as pages
with pages.local_web() as web:
    body = pages.photograph({side})
    for number in range({rows}):
        web.serve(f"/{{number}}.jpg", body)
    print(web.port, len(body), flush=True)
    sys.stdin.read()
"""
BARE = """
import sys, types
sys.modules["wandb"] = types.ModuleType("wandb")
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
folder = sys.argv[1]
Downloader(
    sample_writer_class=WebDatasetSampleWriter,
    resizer=Resizer(image_size={side}, resize_mode="keep_ratio", resize_only_if_bigger=True),
    thread_count={threads}, save_caption=True, extract_exif=False, output_folder=folder,
    column_list=["url", "caption", "WIDTH"], timeout=10, number_sample_per_shard=10000, oom_shard_count=5,
    compute_hash="sha256", verify_hash_type=None, encode_format="jpg", retries=0,
    user_agent_token="img2dataset", disallowed_header_directives=["noai"],
).download_shard((0, f"{{folder}}/rows.arrow"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="img2dataset is not installed: `make downloader`")
def test_downloading_is_nearly_as_fast_as_img2dataset(tmp_path, capsys):
    tests = Path(__file__).parents[2]
    program = SERVER.format(rows=ROWS, side=SIDE)
    server = subprocess.Popen(
        [sys.executable, "-c", program, str(tests)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port, size = map(int, server.stdout.readline().split())
        urls = [f"http://127.0.0.1:{port}/{row}.jpg" for row in range(ROWS)]
        columns = {"url": urls, "caption": ["a picture"] * ROWS, "WIDTH": [768] * ROWS}
        seconds = {"bare": [], "ours": []}
        for attempt in range(2):
            seconds["bare"].append(bare(pa.table(columns), tmp_path / f"bare{attempt}"))
            with peaks() as peaks_seen:
                seconds["ours"].append(ours(pa.table(columns), tmp_path / f"ours{attempt}"))
    finally:
        server.communicate()  # the end of its input ends it
    rates = {name: ROWS / min(times) for name, times in seconds.items()}
    with capsys.disabled():
        print(
            f"\n{os.cpu_count()} cores, {THREADS} threads, pictures of {size / 1e3:.0f} kB: "
            f"img2dataset alone {rates['bare']:.0f} rows/s, by the stage {rates['ours']:.0f} rows/s "
            f"({rates['ours'] / rates['bare']:.2f}), {rates['ours'] * size / 1e6:.1f} MB/s, "
            f"its process at most {max(peaks_seen) / 1024:.0f} MiB"
        )
    assert rates["ours"] > 0.6 * rates["bare"]


@contextlib.contextmanager
def peaks():
    """The peak memory, in KiB, of img2dataset's processes while the body runs."""
    peaks_seen, done = [0], threading.Event()

    def poll():
        while not done.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"pipelines.fetching.program" in (process / "cmdline").read_bytes():
                        lines = (process / "status").read_text().splitlines()
                        peaks_seen.extend(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    watcher = threading.Thread(target=poll)
    watcher.start()
    yield peaks_seen
    done.set()
    watcher.join()


def bare(rows, folder):
    folder.mkdir()
    with pa.ipc.new_file(folder / "rows.arrow", rows.schema) as file:
        file.write_table(rows)
    program = BARE.format(side=SIDE, threads=THREADS)
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    began = time.monotonic()
    subprocess.run([PYTHON, "-c", program, folder], check=True, env=environment)
    return time.monotonic() - began


def ours(rows, folder):
    folder.mkdir()
    pq.write_table(rows, folder / "list.parquet")
    fetching = FetchSettings(
        python=str(PYTHON), image_size=SIDE, threads=THREADS, private_networks=("127.0.0.1/32",)
    )
    settings = DownloadSettings(links=str(folder / "list.parquet"), fetching=fetching)
    began = time.monotonic()
    summary = download_shards(settings, selection=Selection(), url=str(folder / "shards"), run=in_process)
    assert summary.downloaded == ROWS
    return time.monotonic() - began
