"""Hides the progress that compilers write to the error stream, unless they fail."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capture this process's error stream, native code included; replay it on an error."""
    with tempfile.TemporaryFile("w+") as captured:
        try:
            with _redirected(captured.fileno()), contextlib.redirect_stderr(captured):
                yield
        except BaseException:
            captured.seek(0)
            sys.stderr.write(captured.read())
            raise


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    # sys.stderr is Python's view only: the runtimes' own messages go to the file descriptor.
    saved = os.dup(_STDERR)
    os.dup2(target, _STDERR)
    try:
        yield
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)
