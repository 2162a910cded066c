"""Retries transient store errors with jitter.

The clients below this project repeat a request that is refused or breaks off before its response begins. They
do not always repeat one whose response breaks off halfway, or one that a busy store refuses for longer. So
idempotent requests to a remote store go through `with_retries`: reads, listings, deletions, and the creation
of objects that must not exist yet. A commit is not idempotent: `pipelines.tables.commits` looks it up first.
"""

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.storage.faults import NO_SPACE, WRONG_PATH, error_number, plain_text

Result = TypeVar("Result")

BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Mean seconds before each retry; each wait is stretched or shortened by up to a half."""

# Connection errors of the clients, by name: importing botocore and aiohttp here would slow every start.
_CONNECTION_ERRORS = {
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("aiohttp.client_exceptions", "ClientError"),
}
_CLIENTS = ("botocore", "aiohttp")
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# deltalake raises one class for conflicts and for failed requests; only the message tells them apart.
_STORE_MESSAGES = ("Generic S3 error", "Generic GCS error", "Generic MicrosoftAzure error", "HTTP error")


class StoreFailure(OSError):
    """A store that kept failing or denies access; running the job again may help."""


def with_retries(url: str, request: Callable[[], Result]) -> Result:
    """The result of `request`, retried while it fails with a transient error; a local disk gets one attempt.

    Raises:
        StoreFailure: if it still fails after the last retry.
        OSError: or whatever else `request` raises that is not a failure of the store.
    """
    if "://" not in url or url.startswith("file://"):
        return request()
    waits = iter(BACKOFF_SECONDS)
    while True:
        try:
            return request()
        except Exception as error:
            wait = next(waits, None) if is_transient(error) else None
            if wait is None:
                if _is_self_explanatory(error):
                    raise
                raise StoreFailure(f"{url}: {type(error).__name__}: {plain_text(error)}") from error
        sleep_with_jitter(wait)


def sleep_with_jitter(seconds: float) -> None:
    """Sleep for half to one and a half times `seconds`, so that many clients do not retry in step."""
    time.sleep(seconds * random.uniform(0.5, 1.5))


def is_transient(error: Exception) -> bool:
    """Whether a retry may help."""
    # A missing table is a fact and not a failure, though deltalake words both as errors of the store.
    if isinstance(error, DeltaError) and not isinstance(error, TableNotFoundError):
        return any(message in str(error) for message in _STORE_MESSAGES)
    if any((kind.__module__, kind.__name__) in _CONNECTION_ERRORS for kind in type(error).__mro__):
        return True
    # Not by class alone: deltalake raises a plain OSError for a full disk.
    if isinstance(error, _PERMANENT) or error_number(error) in NO_SPACE | WRONG_PATH:
        return False
    return isinstance(error, OSError)


def _is_self_explanatory(error: Exception) -> bool:
    """Whether the error's class says what is wrong; those of the clients (no credentials, ...) do not."""
    if type(error).__module__.partition(".")[0] in _CLIENTS or isinstance(error, PermissionError):
        return False
    return isinstance(error, DeltaError) or not is_transient(error)
