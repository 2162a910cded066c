"""One shard by img2dataset: the program that `pipelines.download.img2dataset` starts in its environment.

    python -m pipelines.fetching.program FOLDER

FOLDER holds `rows.arrow` and `request.json`. Beside them appear the shard's three files, `progress`, and at
the very end `versions.json`. Of img2dataset only the parts that make one shard are used: what it has for many
shards (its plan, its retries, its log of them) is ours.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import sys
import threading
import types
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from pipelines.fetching.causes import FetchError
from pipelines.fetching.guard import GuardedOpener, RequestLimits, Response

REQUEST: Final = "request.json"
ROWS: Final = "rows.arrow"
PROGRESS: Final = "progress"
VERSIONS: Final = "versions.json"
_PROGRESS: Final = struct.Struct("<Q32s")
_NO_PICTURE: Final = bytes(32)

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""As img2dataset's resizer gives it: picture, width, height, the original's, and what went wrong."""


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """What is asked of the program.

    Attributes:
        number: of the shard.
        columns: of the rows, "url" and "caption" among them.
        rows_per_shard: gives the number of digits of a key.
        image_size: and the next four, as img2dataset has them.
        resize_mode: see there.
        resize_only_if_bigger: see there.
        encode_quality: see there.
        threads: see there, `thread_count`.
        limits: of each picture.
        agent: see `GuardedOpener`.
        directives: see `GuardedOpener`.
        private_networks: see `GuardedOpener`.
        decode_seconds: that one picture may take to be decoded, resized and encoded.
        crashed: SHA-256 of pictures that took an earlier try down; they are not decoded again.
    """

    number: int
    columns: tuple[str, ...]
    rows_per_shard: int
    image_size: int
    resize_mode: str
    resize_only_if_bigger: bool
    encode_quality: int
    threads: int
    limits: RequestLimits
    agent: str
    directives: tuple[str, ...]
    private_networks: tuple[str, ...]
    decode_seconds: float
    crashed: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Leave the request in `folder`."""
        (folder / REQUEST).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> ShardRequest:
        """The request in `folder`."""
        values = json.loads((folder / REQUEST).read_text())
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "limits": RequestLimits(**values["limits"])})


class ProgressFile:
    """A small file that says how many pictures are through, and which is being decoded.

    It outlives the process: whoever ended it is found there.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / PROGRESS, os.O_RDWR | os.O_CREAT)
        self._lock = threading.Lock()
        self._steps = 0
        self._decoding = _NO_PICTURE
        self.step()

    def step(self, decoding: bytes | None = None) -> None:
        """One step further; `decoding` is the digest of the picture that is begun, or 32 zeros for none."""
        with self._lock:
            self._steps += 1
            if decoding is not None:
                self._decoding = decoding
            os.pwrite(self._file, _PROGRESS.pack(self._steps, self._decoding), 0)


def read_progress(folder: Path) -> tuple[int, str]:
    """How many steps were taken, and the SHA-256 of the picture being decoded, empty if none is.

    No step means that the work was not even begun.
    """
    try:
        steps, digest = _PROGRESS.unpack((folder / PROGRESS).read_bytes())
    except (OSError, struct.error):
        return 0, ""
    return steps, "" if digest == _NO_PICTURE else digest.hex()


class ProgressOpener:
    """A guard whose answers, good or bad, are progress."""

    def __init__(self, guard: GuardedOpener, progress: ProgressFile) -> None:
        self._guard = guard
        self._progress = progress

    def open(self, request: urllib.request.Request, data: object = None, timeout: object = None) -> Response:
        """As the guard does."""
        try:
            return self._guard.open(request, data, timeout)
        finally:
            self._progress.step()


class MonitoredResizer:
    """A resizer that says which picture it has in hand, passes over those that ended it, and ends in time."""

    def __init__(
        self,
        resize: Callable[..., Resized],
        progress: ProgressFile,
        *,
        crashed: tuple[str, ...],
        seconds: float,
    ) -> None:
        self._resize = resize
        self._progress = progress
        self._crashed = frozenset(crashed)
        self._seconds = seconds

    def __call__(self, picture: io.BytesIO, boxes: object = None) -> Resized:
        """As img2dataset's resizer, its complaints in words of ours."""
        digest = hashlib.sha256(picture.getbuffer()).digest()
        if digest.hex() in self._crashed:
            return *(None,) * 5, str(FetchError("crashed"))
        self._progress.step(digest)
        # The signal's default action ends the process even inside C code.
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        *resized, fault = self._resize(picture, boxes)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._progress.step(_NO_PICTURE)
        return *resized, fault if fault is None else str(_said(fault))  # type: ignore[return-value]


def _said(fault: str) -> FetchError:
    return FetchError("too_many_pixels" if "CV_IO_MAX_IMAGE" in fault else "broken_image", fault)


def make_shard(folder: Path) -> None:
    """Carry out the request in `folder`."""
    request = ShardRequest.read(folder)
    # img2dataset imports it for a log that is not kept here; it is large, and is not installed.
    sys.modules["wandb"] = types.ModuleType("wandb")
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    # From here on what goes wrong is not the installation's fault.
    progress = ProgressFile(folder)
    guard = GuardedOpener(
        limits=request.limits,
        agent=request.agent,
        directives=request.directives,
        private_networks=request.private_networks,
    )
    urllib.request.install_opener(ProgressOpener(guard, progress))  # type: ignore[arg-type]
    resizer = Resizer(
        image_size=request.image_size,
        resize_mode=request.resize_mode,
        resize_only_if_bigger=request.resize_only_if_bigger,
        encode_quality=request.encode_quality,
    )
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=MonitoredResizer(resizer, progress, crashed=request.crashed, seconds=request.decode_seconds),
        thread_count=request.threads,
        save_caption=True,
        # It may say where and by whom a picture was taken, and nothing here reads it.
        extract_exif=False,
        output_folder=str(folder),
        column_list=list(request.columns),
        timeout=None,  # the guard's own, which bound a picture and not a wait
        number_sample_per_shard=request.rows_per_shard,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,  # the guard's own, which ask no second time for what is gone
        user_agent_token=request.agent,
        disallowed_header_directives=None,  # the guard's own, which are heard on every hop
    )
    downloader.download_shard((request.number, str(folder / ROWS)))
    packages = ("img2dataset", "opencv-python-headless")
    (folder / VERSIONS).write_text(json.dumps({name: version(name) for name in packages}))


def _end_with_the_parent(folder: Path) -> None:
    """Wait until the parent's end of the pipe closes; if it died, nobody wants the shard."""
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Entry point."""
    folder = Path(arguments[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, args=(folder,), daemon=True).start()
    make_shard(folder)
    return 0


def _leave(code: Any) -> None:  # noqa: ANN401
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
