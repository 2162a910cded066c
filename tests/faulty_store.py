"""The S3 server of a test, with `fault_proxy` before it."""

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
    """Route all requests to the store through the proxy, a process of its own like the server."""
    port = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    arguments = [fault_proxy.__file__, port, str(log), str(seed), str(rate), str(most)]
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{int(proxy.stdout.readline())}")
                s3fs.S3FileSystem.clear_instance_cache()
                yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            proxy.kill()


def faults_in(log: Path) -> Counter[tuple[str, str]]:
    """The number of faults by operation and kind."""
    return Counter(tuple(json.loads(line)) for line in log.read_text().splitlines())
