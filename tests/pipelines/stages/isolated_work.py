"""What test_isolation has done in child processes; imports little, because each child imports it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines.rejections import Rejected


class Unsendable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def act(order: str) -> object:  # noqa: C901
    """Does to its process what the order says."""
    if order == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == "read nowhere":
        ctypes.string_at(0)
    if order == "exit":
        os._exit(7)
    if order == "leave":
        sys.exit(3)
    if order == "hang":
        time.sleep(60)
    if order == "close and hang":
        os.closerange(3, 100)
        time.sleep(60)
    if order == "leave a process behind":
        subprocess.Popen(["sleep", "5"], close_fds=False)
        os._exit(1)
    if order == "reject":
        raise Rejected("too_small", "1 x 1")
    if order == "raise the unsendable":
        raise Unsendable("one", "two")
    if order == "return the unsendable":
        return lambda: None
    if order == "print":
        sys.stdout.write("to standard output")
        sys.stdout.flush()
        os.write(1, b"and once more\n")
    if order.startswith("once:"):
        mark = Path(order.removeprefix("once:"))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return f"done {order}"


def process(_: object) -> int:
    return os.getpid()
