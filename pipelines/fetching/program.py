"""Makes one shard with img2dataset: the program that `pipelines.download.img2dataset` starts.

    python -m pipelines.fetching.program FOLDER

FOLDER contains `rows.arrow` and `request.json`. The program writes the shard's three files, `progress`, and
at the very end `versions.json` beside them. Of img2dataset it uses only what makes one shard: planning,
retries and logs across shards are this project's own.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

from pipelines.fetching.causes import FetchError
from pipelines.fetching.guard import GuardedOpener, RequestRules

REQUEST: Final = "request.json"
ROWS: Final = "rows.arrow"
PROGRESS: Final = "progress"
VERSIONS: Final = "versions.json"
_PROGRESS: Final = struct.Struct("<Q32s")
_NO_IMAGE: Final = bytes(32)

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""What img2dataset's resizer returns: image, width, height, the original's width and height, error."""


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """The input of the program.

    Attributes:
        number: of the shard.
        columns: of the rows, "url" and "caption" among them.
        rows_per_shard: determines the number of digits of a key.
        resizing: arguments of img2dataset's `Resizer`.
        threads: img2dataset's `thread_count`.
        rules: of the requests.
        crashed: SHA-256 of images that crashed an earlier attempt; they are not decoded again.
    """

    number: int
    columns: Sequence[str]
    rows_per_shard: int
    resizing: dict[str, Any]
    threads: int
    rules: RequestRules
    crashed: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write the request into `folder`."""
        (folder / REQUEST).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> ShardRequest:
        """The request in `folder`."""
        values = json.loads((folder / REQUEST).read_text())
        return cls(**{**values, "rules": RequestRules(**values["rules"])})


class ProgressFile:
    """A small file with the number of steps done and the image being decoded.

    It outlives the process, so that an image that crashed it can be identified.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / PROGRESS, os.O_RDWR | os.O_CREAT)
        self._lock = threading.Lock()
        self._steps = 0
        self._decoding = _NO_IMAGE
        self.step()

    def step(self, decoding: bytes | None = None) -> None:
        """Count a step; `decoding` is the digest of the image whose decoding begins, or 32 zeros for none."""
        with self._lock:
            self._steps += 1
            if decoding is not None:
                self._decoding = decoding
            os.pwrite(self._file, _PROGRESS.pack(self._steps, self._decoding), 0)


def read_progress(folder: Path) -> tuple[int, str]:
    """The number of steps, and the SHA-256 of the image being decoded, empty if none is.

    No step means that img2dataset did not even start.
    """
    try:
        steps, digest = _PROGRESS.unpack((folder / PROGRESS).read_bytes())
    except (OSError, struct.error):
        return 0, ""
    return steps, "" if digest == _NO_IMAGE else digest.hex()


@dataclass(frozen=True, kw_only=True)
class MonitoredResizer:
    """A resizer that records the image it decodes, skips images that crashed it, and has a time limit."""

    resize: Callable[..., Resized]
    progress: ProgressFile
    crashed: Sequence[str]
    seconds: float

    def __call__(self, image: io.BytesIO, boxes: object = None) -> Resized:
        """As img2dataset's resizer, with its errors translated to `FetchError`'s text."""
        digest = hashlib.sha256(image.getbuffer()).digest()
        if digest.hex() in self.crashed:
            return *(None,) * 5, str(FetchError("crashed"))
        self.progress.step(digest)
        # The signal's default action ends the process even inside C code, where no exception reaches.
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        *resized, message = self.resize(image, boxes)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.progress.step(_NO_IMAGE)
        if message is not None:
            cause = "too_many_pixels" if "CV_IO_MAX_IMAGE" in message else "broken_image"
            message = str(FetchError(cause, message))
        return *resized, message  # type: ignore[return-value]


def make_shard(folder: Path) -> None:
    """Carry out the request in `folder`."""
    request = ShardRequest.read(folder)
    # img2dataset imports it for a log that is not used here; it is large, and not installed.
    sys.modules["wandb"] = types.ModuleType("wandb")
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    # The first step: errors after it are no fault of the installation.
    progress = ProgressFile(folder)
    opener = GuardedOpener(request.rules, on_response=progress.step)
    urllib.request.install_opener(opener)  # type: ignore[arg-type]
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=MonitoredResizer(
            resize=Resizer(**request.resizing),
            progress=progress,
            crashed=request.crashed,
            seconds=request.rules.decode_seconds,
        ),
        thread_count=request.threads,
        save_caption=True,
        # EXIF may contain where and by whom a photo was taken, and nothing here reads it.
        extract_exif=False,
        output_folder=str(folder),
        column_list=list(request.columns),
        timeout=None,  # the opener's rules bound an image, not a wait
        number_sample_per_shard=request.rows_per_shard,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,  # the opener retries transient causes only
        user_agent_token=request.rules.agent,
        disallowed_header_directives=None,  # the opener checks them on every redirect too
    )
    downloader.download_shard((request.number, str(folder / ROWS)))
    packages = ("img2dataset", "opencv-python-headless")
    (folder / VERSIONS).write_text(json.dumps({name: version(name) for name in packages}))


def _exit_with_parent(folder: Path) -> None:
    """Exit when the parent's end of the pipe closes: if it died, nobody needs the shard."""
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(arguments: list[str]) -> NoReturn:
    """Entry point."""
    folder = Path(arguments[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    make_shard(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for img2dataset's threads.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
