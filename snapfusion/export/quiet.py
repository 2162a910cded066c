"""Compilers write pages of progress to the error stream; here it is kept, and shown only if they fail."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what this process writes to its error stream, native code included; replay it on an error."""
    with tempfile.TemporaryFile("w+") as held:
        try:
            with _redirected(held.fileno()), contextlib.redirect_stderr(held):
                yield
        except BaseException:
            held.seek(0)
            sys.stderr.write(held.read())
            raise


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    # sys.stderr is only Python's view: the runtimes' own messages go to the file descriptor.
    saved = os.dup(_STDERR)
    os.dup2(target, _STDERR)
    try:
        yield
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)
