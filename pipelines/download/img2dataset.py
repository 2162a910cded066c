"""Runs img2dataset isolated: a supervised process of its own environment for each shard.

It fetches content from anybody and decodes it in C, so the process gets no credentials, sees only a temporary
folder, and may crash: the image that crashed it is identified, and the shard is retried without it. Rows that
still fail are recorded as failed. No row is lost.
"""

import contextlib
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
from pipelines.download.settings import RESIZING, FetchSettings
from pipelines.fetching.causes import FetchError, cause_of
from pipelines.fetching.guard import RequestRules
from pipelines.fetching.program import ROWS, VERSIONS, ShardRequest, read_progress

# Attempts that end without an image to blame, and images that a shard may be retried without.
_MAX_ATTEMPTS: Final = 3
_MAX_CRASHED: Final = 10
_POLL_SECONDS: Final = 0.2
# A name server that does not answer blocks a thread beyond the image's own seconds.
_LOOKUP_SECONDS: Final = 30.0
_START_SECONDS: Final = 120.0
# The environment variables that the process inherits.
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH")
_LOG_CHARS: Final = 500


class DownloadError(RuntimeError):
    """img2dataset cannot be run: a fault of the installation, not of a row."""


@dataclass(frozen=True, kw_only=True)
class FetchedShard:
    """A shard on the local disk.

    Attributes:
        files: path by suffix, for each of `SHARD_SUFFIXES`.
        downloaded: images in the tar.
        failed: rows by cause.
        versions: of the packages that made it; empty if none did.
    """

    files: Mapping[str, Path]
    downloaded: int
    failed: dict[str, int]
    versions: dict[str, str]


class ShardFetcher:
    """Makes a shard from rows of URLs and captions."""

    def __init__(self, settings: FetchSettings, *, rows_per_shard: int) -> None:
        self._settings = settings
        self._rows_per_shard = rows_per_shard
        # Not `resolve`: a virtual environment's interpreter is a link, and works only by that name.
        self._python = Path(settings.python).absolute()

    def __call__(self, rows: pa.Table, *, number: int, folder: Path) -> FetchedShard:
        """Fetch the images of `rows` into the empty folder `folder`, which contains the shard afterwards.

        Args:
            rows: url, caption and metadata, with values that JSON can hold.
            number: of the shard, the first five digits of its keys.
            folder: on a local disk.

        Raises:
            DownloadError: if the interpreter does not exist, or img2dataset does not start in it.
        """
        if not os.access(self._python, os.X_OK):
            raise DownloadError(
                f"img2dataset's interpreter {self._python} does not exist: run `make downloader`, or set "
                "download.fetching.python to its path on the machines that download"
            )
        # img2dataset pads the row's index in a key to this width.
        digits = len(str(self._rows_per_shard - 1)) if self._rows_per_shard > 1 else 0
        keys = [f"{number:05d}{row:0{digits}d}" for row in range(rows.num_rows)]
        request = self._request(number, rows.column_names)
        work, attempts = folder / "work", 0
        while True:
            fault = self._attempt(rows, request, work)
            if not fault:
                return _complete_shard(rows, work, number=number, keys=keys)
            steps, image = read_progress(work)
            shutil.rmtree(work, ignore_errors=True)
            if not steps:
                raise DownloadError(
                    f"img2dataset does not start with {self._python} ({fault}): install its environment again"
                )
            if image:
                request = replace(request, crashed=(*request.crashed, image))
            else:
                attempts += 1
            if attempts == _MAX_ATTEMPTS or len(request.crashed) > _MAX_CRASHED:
                return _failed_shard(rows, folder, number=number, keys=keys, fault=fault)

    def _request(self, number: int, columns: list[str]) -> ShardRequest:
        settings = self._settings
        return ShardRequest(
            number=number,
            columns=columns,
            rows_per_shard=self._rows_per_shard,
            resizing={name: getattr(settings, name) for name in RESIZING},
            threads=settings.threads,
            rules=RequestRules(
                **settings.limits.to_values(),
                agent=settings.user_agent_token,
                directives=settings.respected,
                private_networks=settings.private_networks,
            ),
        )

    def _attempt(self, rows: pa.Table, request: ShardRequest, folder: Path) -> str:
        """Run the program once; returns its error, empty if there was none."""
        folder.mkdir()
        request.write(folder)
        with pa.ipc.new_file(folder / ROWS, rows.schema) as file:
            file.write_table(rows)
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(
                [self._python, "-s", "-m", "pipelines.fetching.program", str(folder)],
                # The program exits when this pipe closes, that is, when this process dies.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self._environment(folder),
            ) as process,
        ):
            try:
                stalled = self._is_stalled(process, folder)
            finally:
                process.kill()
        code = process.returncode
        if code == 0 and (folder / VERSIONS).exists():
            return ""
        output = (folder / "log").read_text(errors="replace").strip()[-_LOG_CHARS:]
        return "stood still" if stalled else f"exit status {code}: {output}"

    def _is_stalled(self, process: subprocess.Popen[bytes], folder: Path) -> bool:
        """Wait for the process to exit; True if it makes no progress for longer than a row may take."""
        limits = self._settings.limits
        pauses = limits.pause * (2 ** (limits.tries - 1) - 1)
        row_seconds = limits.tries * (limits.seconds + _LOOKUP_SECONDS) + pauses + limits.decode_seconds
        steps, last_step = 0, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
                return False
            now = time.monotonic()
            new_steps, _ = read_progress(folder)
            if new_steps != steps:
                steps, last_step = new_steps, now
            # Starting, with its imports, takes longer than any row.
            if now - last_step > row_seconds + (_START_SECONDS if steps == 0 else 0):
                return True

    def _environment(self, folder: Path) -> dict[str, str]:
        """The program's variables, with a copy of its code: nothing else of this project is on its path."""
        code = folder / "code" / "pipelines"
        compiled = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(fetching.__file__).parent, code / "fetching", ignore=compiled)
        (code / "__init__.py").touch()
        return {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "PYTHONPATH": str(code.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            # albumentations would look for a newer version of itself on the network.
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "OPENCV_IO_MAX_IMAGE_PIXELS": str(self._settings.limits.max_pixels),
            # For the C library's resolver, which ignores every deadline set in Python.
            "RES_OPTIONS": "timeout:5 attempts:2",
        }


def _complete_shard(rows: pa.Table, work: Path, *, number: int, keys: list[str]) -> FetchedShard:
    """The finished shard, with every row in its sidecar."""
    files = _shard_files(work, number)
    with tarfile.open(files[".tar"]) as archive:
        arrived = {name.partition(".")[0] for name in archive.getnames()}
    sidecar = pq.read_table(files[".parquet"])
    listed = zip(sidecar.column("key").to_pylist(), sidecar.column("status").to_pylist(), strict=True)
    is_true = [status != "success" or key in arrived for key, status in listed]
    sidecar = sidecar.filter(pa.array(is_true, pa.bool_()))
    # img2dataset only prints an error about a row that it cannot serialise, and drops it.
    known = {*sidecar.column("key").to_pylist(), *arrived}
    lost = [row for row, key in enumerate(keys) if key not in known]
    if lost or not all(is_true):
        message = str(FetchError("interrupted", "img2dataset lost the row"))
        missing = _failed_rows(rows.take(pa.array(lost, pa.int64())), [keys[row] for row in lost], message)
        sidecar = pa.concat_tables([sidecar, missing], promote_options="default")
        pq.write_table(sidecar, files[".parquet"])
    failed = sidecar.filter(pc.not_equal(sidecar.column("status"), "success"))
    causes = Counter(cause_of(message) for message in failed.column("error_message").to_pylist())
    return FetchedShard(
        files=files,
        downloaded=len(arrived),
        failed=dict(sorted(causes.items())),
        versions=json.loads((work / VERSIONS).read_text()),
    )


def _failed_shard(rows: pa.Table, folder: Path, *, number: int, keys: list[str], fault: str) -> FetchedShard:
    """A shard without images, whose sidecar lists every row as failed."""
    files = _shard_files(folder, number)
    message = str(FetchError("interrupted", fault))
    pq.write_table(_failed_rows(rows, keys, message), files[".parquet"])
    stats: dict[str, Any] = {
        "count": rows.num_rows,
        "successes": 0,
        "failed_to_download": rows.num_rows,
        "failed_to_resize": 0,
        "status_dict": {message: rows.num_rows},
    }
    files["_stats.json"].write_text(json.dumps(stats, indent=4))
    tarfile.open(files[".tar"], "w").close()
    return FetchedShard(files=files, downloaded=0, failed={"interrupted": rows.num_rows}, versions={})


def _shard_files(folder: Path, number: int) -> dict[str, Path]:
    return {suffix: folder / f"{number:05d}{suffix}" for suffix in SHARD_SUFFIXES}


def _failed_rows(rows: pa.Table, keys: list[str], message: str) -> pa.Table:
    """Rows in the form that img2dataset's sidecar gives to failed ones."""
    count = len(keys)
    texts = {"key": keys, "status": ["failed_to_download"] * count, "error_message": [message] * count}
    sizes = ("width", "height", "original_width", "original_height")
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
    columns |= dict.fromkeys(sizes, pa.nulls(count, pa.int32()))
    return pa.table({**columns, "sha256": pa.nulls(count, pa.string())})
