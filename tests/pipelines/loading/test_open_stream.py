"""A process that ends while loaders are still open ends with its own exit code, not by a signal."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("open_stream.py")


@pytest.mark.parametrize("starts", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_an_open_stream_ends_no_process_by_a_signal(starts, whole_run):
    command = [sys.executable, str(SCRIPT), str(whole_run.out)]
    for _ in range(starts):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
