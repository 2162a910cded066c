"""img2dataset kept at arm's length: a process of its own for each shard, in its own environment, watched.

What it fetches comes from anybody, and what it decodes with is C. So the process is given no credentials,
knows no place but a temporary folder, and may die: the picture that ended it is known, and the shard is tried
again without it. What still fails has its rows accounted as failed. No row is lost.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import fetching
from pipelines.download.receipts import SHARD_SUFFIXES
from pipelines.download.settings import FetchSettings
from pipelines.fetching.causes import FetchError, cause_of
from pipelines.fetching.guard import RequestLimits
from pipelines.fetching.program import ROWS, VERSIONS, ShardRequest, read_progress

# Tries that end with no picture to blame, and pictures that a shard is tried again without.
_TRIES: Final = 3
_MAX_CRASHED: Final = 10
_LOOK_SECONDS: Final = 0.2
# A name server that does not answer holds a thread beyond the picture's own seconds.
_LOOKUP_SECONDS: Final = 30.0
_START_SECONDS: Final = 120.0
# What the process may know of this one.
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH")
_LOG_CHARS: Final = 500


class DownloadError(RuntimeError):
    """img2dataset cannot be run: a fault of the installation, not of a row."""


@dataclass(frozen=True, kw_only=True)
class FetchedShard:
    """A shard on the local disk.

    Attributes:
        files: ending -> place, for each of `SHARD_SUFFIXES`.
        downloaded: pictures in the tar.
        failed: cause -> rows.
        versions: of the packages that made it; empty if none did.
    """

    files: Mapping[str, Path]
    downloaded: int
    failed: dict[str, int]
    versions: dict[str, str]


class ShardFetcher:
    """Rows in, a shard out."""

    def __init__(self, settings: FetchSettings, *, rows_per_shard: int) -> None:
        self._settings = settings
        self._rows_per_shard = rows_per_shard
        # No `resolve`: a virtual environment's interpreter is a link.
        self._python = Path(settings.python).absolute()

    def __call__(self, rows: pa.Table, *, number: int, folder: Path) -> FetchedShard:
        """Fetch the pictures of `rows`, in the empty folder `folder`, which holds the shard afterwards.

        Args:
            rows: url, caption and whatever else is to be kept; values that JSON knows.
            number: of the shard, the first five digits of its keys.
            folder: on a local disk.

        Raises:
            DownloadError: if there is no such interpreter, or img2dataset does not start in it.
        """
        if not os.access(self._python, os.X_OK):
            raise DownloadError(
                f"img2dataset's interpreter {self._python} is not there: `make downloader`, or set "
                "download.fetching.python to where it is on the machines that download"
            )
        request = self._request(number, tuple(rows.column_names))
        work, tried = folder / "work", 0
        while True:
            fault = self._try(rows, request, work)
            if not fault:
                return _settle(rows, work, number=number, digits=_digits(self._rows_per_shard))
            steps, picture = read_progress(work)
            shutil.rmtree(work, ignore_errors=True)
            if not steps:
                raise DownloadError(
                    f"img2dataset does not start with {self._python} ({fault}): make its environment again"
                )
            if picture:
                request = replace(request, crashed=(*request.crashed, picture))
            else:
                tried += 1
            if tried == _TRIES or len(request.crashed) > _MAX_CRASHED:
                digits = _digits(self._rows_per_shard)
                return _give_up(rows, folder, number=number, digits=digits, fault=fault)

    def _request(self, number: int, columns: tuple[str, ...]) -> ShardRequest:
        settings, limits = self._settings, self._settings.limits
        return ShardRequest(
            number=number,
            columns=columns,
            rows_per_shard=self._rows_per_shard,
            image_size=settings.image_size,
            resize_mode=settings.resize_mode,
            resize_only_if_bigger=settings.resize_only_if_bigger,
            encode_quality=settings.encode_quality,
            threads=settings.threads,
            limits=RequestLimits(
                max_bytes=limits.max_bytes,
                max_pixels=limits.max_pixels,
                max_redirects=limits.max_redirects,
                seconds=limits.seconds,
                tries=limits.tries,
                pause=limits.pause,
            ),
            agent=settings.user_agent_token,
            directives=settings.respected,
            private_networks=settings.private_networks,
            decode_seconds=limits.decode_seconds,
        )

    def _try(self, rows: pa.Table, request: ShardRequest, folder: Path) -> str:
        """Run the program once; returns what went wrong, empty if nothing did."""
        folder.mkdir()
        request.write(folder)
        with pa.ipc.new_file(folder / ROWS, rows.schema) as file:
            file.write_table(rows)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [self._python, "-s", "-m", "pipelines.fetching.program", str(folder)],
                # Its end tells the program that this process died.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self._environment(folder),
            )
            try:
                stood_still = self._watch(process, folder)
            finally:
                process.kill()
                code = process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        if code == 0 and (folder / VERSIONS).exists():
            return ""
        said = (folder / "log").read_text(errors="replace").strip()[-_LOG_CHARS:]
        return "stood still" if stood_still else f"exit status {code}: {said}"

    def _watch(self, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Wait for the end; returns whether there was none because nothing went on any more."""
        limits = self._settings.limits
        pauses = limits.pause * (2 ** (limits.tries - 1) - 1)
        row_seconds = limits.tries * (limits.seconds + _LOOKUP_SECONDS) + pauses + limits.decode_seconds
        steps, moved = 0, time.monotonic()
        while True:
            try:
                process.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                seen, _ = read_progress(folder)
                if seen != steps:
                    steps, moved = seen, now
                # Ending is one more step that may take its time.
                if now - moved > row_seconds + (_START_SECONDS if steps == 0 else 0):
                    return True
            else:
                return False

    def _environment(self, folder: Path) -> dict[str, str]:
        """The program's variables, with a copy of its code: nothing else of ours is on its path."""
        code = folder / "code" / "pipelines"
        shutil.copytree(
            Path(fetching.__file__).parent, code / "fetching", ignore=shutil.ignore_patterns("__pycache__")
        )
        (code / "__init__.py").touch()
        return {
            **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "PYTHONPATH": str(code.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            # albumentations would look on the network for a newer one of itself.
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "OPENCV_IO_MAX_IMAGE_PIXELS": str(self._settings.limits.max_pixels),
            # For the C library's look-ups, which no deadline of Python's reaches.
            "RES_OPTIONS": "timeout:5 attempts:2",
        }


def _settle(rows: pa.Table, work: Path, *, number: int, digits: int) -> FetchedShard:
    """The finished shard, every row of it in the sidecar."""
    files = {ending: work / f"{number:05d}{ending}" for ending in SHARD_SUFFIXES}
    with tarfile.open(files[".tar"]) as archive:
        arrived = {name.partition(".")[0] for name in archive.getnames()}
    sidecar = pq.read_table(files[".parquet"])
    told = zip(sidecar.column("key").to_pylist(), sidecar.column("status").to_pylist(), strict=True)
    true = [status != "success" or key in arrived for key, status in told]
    sidecar = sidecar.filter(pa.array(true, pa.bool_()))
    keys = [f"{number:05d}{row:0{digits}d}" for row in range(rows.num_rows)]
    # img2dataset prints what went wrong with a row that it could not write down, and goes on.
    known = {*sidecar.column("key").to_pylist(), *arrived}
    lost = [row for row, key in enumerate(keys) if key not in known]
    if lost or not all(true):
        fault = str(FetchError("interrupted", "img2dataset lost the row"))
        unwritten = _failed(rows.take(pa.array(lost, pa.int64())), [keys[row] for row in lost], fault)
        sidecar = pa.concat_tables([sidecar, unwritten], promote_options="default")
        pq.write_table(sidecar, files[".parquet"])
    failed = sidecar.filter(pc.not_equal(sidecar.column("status"), "success"))
    causes = Counter(cause_of(message) for message in failed.column("error_message").to_pylist())
    return FetchedShard(
        files=files,
        downloaded=len(arrived),
        failed=dict(sorted(causes.items())),
        versions=json.loads((work / VERSIONS).read_text()),
    )


def _give_up(rows: pa.Table, folder: Path, *, number: int, digits: int, fault: str) -> FetchedShard:
    """A shard without pictures, whose sidecar says of every row that it was not had."""
    files = {ending: folder / f"{number:05d}{ending}" for ending in SHARD_SUFFIXES}
    keys = [f"{number:05d}{row:0{digits}d}" for row in range(rows.num_rows)]
    message = str(FetchError("interrupted", fault))
    pq.write_table(_failed(rows, keys, message), files[".parquet"])
    stats: dict[str, Any] = {
        "count": rows.num_rows,
        "successes": 0,
        "failed_to_download": rows.num_rows,
        "failed_to_resize": 0,
        "status_dict": {message: rows.num_rows},
    }
    files["_stats.json"].write_text(json.dumps(stats, indent=4))
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    files[".tar"].write_bytes(empty.getvalue())
    return FetchedShard(files=files, downloaded=0, failed={"interrupted": rows.num_rows}, versions={})


def _failed(rows: pa.Table, keys: list[str], message: str) -> pa.Table:
    """Rows as img2dataset's sidecar has those that failed."""
    texts = {
        "key": keys,
        "status": ["failed_to_download"] * len(keys),
        "error_message": [message] * len(keys),
    }
    for name, values in texts.items():
        rows = rows.append_column(name, pa.array(values, pa.string()))
    for name in ("width", "height", "original_width", "original_height"):
        rows = rows.append_column(name, pa.nulls(len(keys), pa.int32()))
    return rows.append_column("sha256", pa.nulls(len(keys), pa.string()))


def _digits(rows_per_shard: int) -> int:
    """Of a row's place in its key, as img2dataset counts them."""
    return len(str(rows_per_shard - 1)) if rows_per_shard > 1 else 0
