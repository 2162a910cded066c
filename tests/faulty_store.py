"""The S3 server of a test, with `fault_proxy` before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fault_proxy
import pytest
import s3fs


@contextmanager
def faulty(log: Path, *, seed: int, rate: float, most: int) -> Iterator[None]:
    """All that is asked of the store goes through the proxy; a process of its own, as the server is."""
    there = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    words = [fault_proxy.__file__, there, str(log), str(seed), str(rate), str(most)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            port = int(proxy.stdout.readline())
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
                s3fs.S3FileSystem.clear_instance_cache()
                yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            proxy.kill()


def faults_in(log: Path) -> Counter[tuple[str, str]]:
    """How often each operation met each kind of fault."""
    return Counter(tuple(json.loads(line)) for line in log.read_text().splitlines())
