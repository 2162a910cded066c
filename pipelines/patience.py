"""What a store fails at for a moment is asked of it again.

The clients under us repeat a request that is refused or breaks off before its answer begins. They do not
always repeat one whose answer breaks off in the middle, or one that the store was busy for longer; so what we
ask of a remote store goes through here. Asked again is only what may be: to read, to look, and to make an
object that must not be there yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from deltalake.exceptions import DeltaError, TableNotFoundError

Answer = TypeVar("Answer")

WAITS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds before each further try, on average; each is stretched or shortened by up to a half."""

_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# What deltalake says of the request, where its class of error does not tell.
_OF_THE_STORE = ("Generic S3 error", "Generic GCS error", "Generic MicrosoftAzure error", "HTTP error")


def patiently(url: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gives, of a store that may fail for a moment; on a local disk it is asked once.

    Raises:
        OSError: or what else `ask` raises, if that lasts, or is no failure of the store.
    """
    if "://" not in url or url.startswith("file://"):
        return ask()
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            if not passes(error):
                raise
        pause(wait)
    return ask()


def pause(seconds: float) -> None:
    """Wait about so long; not all clients at the same time."""
    time.sleep(seconds * random.uniform(0.5, 1.5))


def passes(error: Exception) -> bool:
    """Whether it may be that asking again helps."""
    if isinstance(error, DeltaError) and not isinstance(error, TableNotFoundError):
        return any(words in str(error) for words in _OF_THE_STORE)
    return isinstance(error, OSError) and not isinstance(error, _LASTING)
