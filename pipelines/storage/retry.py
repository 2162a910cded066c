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

Result = TypeVar("Result")

BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds before each further try, on average; each is stretched or shortened by up to a half."""

# What clients raise of the way to the store, in classes of their own; by name, as importing them takes long.
_CONNECTION_ERRORS = {
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("aiohttp.client_exceptions", "ClientError"),
}
_CLIENTS = ("botocore", "aiohttp")
_PERMANENT_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
# What deltalake says of the request, where its class of error does not tell.
_STORE_MESSAGES = ("Generic S3 error", "Generic GCS error", "Generic MicrosoftAzure error", "HTTP error")


class StoreFailure(OSError):
    """A store that kept failing, or that lets nobody in; a second try of the whole work may help."""


def with_retries(url: str, ask: Callable[[], Result]) -> Result:
    """What `ask` gives, of a store that may fail for a moment; on a local disk it is asked once.

    Raises:
        StoreFailure: if it fails for longer.
        OSError: or what else `ask` raises, if that is no failure of the store.
    """
    if "://" not in url or url.startswith("file://"):
        return ask()
    waits = iter(BACKOFF_SECONDS)
    while True:
        try:
            return ask()
        except Exception as error:
            wait = next(waits, None) if is_transient(error) else None
            if wait is None:
                if _is_self_explanatory(error):
                    raise
                raise StoreFailure(f"{url}: {type(error).__name__}: {error}") from error
        sleep_with_jitter(wait)


def sleep_with_jitter(seconds: float) -> None:
    """Wait about so long; not all clients at the same time."""
    time.sleep(seconds * random.uniform(0.5, 1.5))


def is_transient(error: Exception) -> bool:
    """Whether it may be that asking again helps."""
    if isinstance(error, DeltaError) and not isinstance(error, TableNotFoundError):
        return any(words in str(error) for words in _STORE_MESSAGES)
    if any((kind.__module__, kind.__name__) in _CONNECTION_ERRORS for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and not isinstance(error, _PERMANENT_ERRORS)


def _is_self_explanatory(error: Exception) -> bool:
    """Whether its class says what is wrong; those of the clients, as for want of credentials, do not."""
    if type(error).__module__.partition(".")[0] in _CLIENTS or isinstance(error, PermissionError):
        return False
    return isinstance(error, DeltaError) or not is_transient(error)
