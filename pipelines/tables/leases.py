"""Leases on a table: one process appends at a time, and versions in use are known; and on a training.

They stand beside the table in `<table>.leases/` and expire unless they are renewed: a holder that was killed
blocks nobody for longer than `LEASE_SECONDS`. Leases save work and files, and decide nothing: the table's log
alone decides what is committed, once. If two processes hold one at a time (a clock that is minutes off, a
process that was suspended), that costs double work and no row.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import fsspec

from pipelines.storage.objects import StorageError, list_names, read_bytes, replace_object, write_once

LEASE_SECONDS: Final = 600.0
"""How long a lease lasts without being renewed; it is renewed after a quarter of that."""

_APPEND_LEASE = re.compile(r"turn-(\d{8})\.json$")


class TableBusy(RuntimeError):
    """Another process holds the append lease; the message says which, and until when."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A lease as its holder last renewed it.

    Attributes:
        holder: a readable name: host, process, and purpose.
        version: of the table that is read; None for an append lease.
        until: seconds of the epoch at which it expires.
    """

    holder: str
    version: int | None
    until: float

    @property
    def expired(self) -> bool:
        """Whether its holder has not renewed it in time."""
        return self.until <= time.time()


def holder_name(purpose: str) -> str:
    """The name of this process as a holder: purpose, host and process id."""
    return f"{purpose} on {socket.gethostname()}, process {os.getpid()}"


@contextmanager
def append_lease(url: str, *, purpose: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold the lease to append to the table at `url` within the context.

    Each lease is an object with the next number, which only one process can create: no store offers locks,
    but all offer creation under a free name.

    Raises:
        TableBusy: if another process holds it.
    """
    number, last = _last_turn(_folder(url))
    if last is not None and not last.expired:
        raise TableBusy(_busy_message(url, last))
    with _turn(_folder(url), number + 1, purpose=purpose, seconds=seconds) as other:
        if other is not None:
            raise TableBusy(_busy_message(url, other))
        yield


@contextmanager
def exclusive_lease(folder: str, *, purpose: str, seconds: float) -> Iterator[None]:
    """Hold the lease in `folder`, a URL, alone within the context.

    A holder is at work as long as it renews its lease, whatever its clock says: one that ended is followed at
    once, and one that was killed after at most `seconds`.

    Args:
        folder: of the leases.
        purpose: named to whoever comes meanwhile.
        seconds: without a renewal after which a holder counts as dead; it is renewed four times as often.

    Raises:
        TableBusy: if another process holds it, as its renewals show.
    """
    number, last = _last_turn(folder)
    path, waited_until = _turn_path(folder, number), time.monotonic() + seconds
    while last is not None and last.until > time.time() - LEASE_SECONDS and time.monotonic() < waited_until:
        time.sleep(seconds / 20)
        renewed = _read(path)
        if renewed is not None and renewed.until and renewed != last:
            raise TableBusy(_at_work_message(folder, renewed))
        last = renewed
    with _turn(folder, number + 1, purpose=purpose, seconds=seconds) as other:
        if other is not None:
            raise TableBusy(_at_work_message(folder, other))
        yield


def _last_turn(folder: str) -> tuple[int, Lease | None]:
    """The number of the newest turn in a folder, 0 if there is none, and its lease."""
    numbers = [int(found[1]) for name in list_names(folder) if (found := _APPEND_LEASE.search(name))]
    number = max(numbers, default=0)
    return number, _read(_turn_path(folder, number)) if number else None


@contextmanager
def _turn(folder: str, number: int, *, purpose: str, seconds: float) -> Iterator[Lease | None]:
    """Take a turn within the context; yields the lease of the process that has taken it first, if one has."""
    path = _turn_path(folder, number)
    mine = Lease(holder=holder_name(purpose), version=None, until=time.time() + seconds)
    # If the response to the creation was lost, the retry finds our own lease.
    if not write_once(path, _serialized(mine)) and (other := _read(path)) != mine:
        yield other or replace(mine, holder="another process")
        return
    with _renewed(path, mine, seconds=seconds):
        yield None


def _turn_path(folder: str, number: int) -> str:
    return f"{folder}/turn-{number:08d}.json"


@contextmanager
def read_lease(url: str, *, version: int, purpose: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold a version of the table at `url` within the context: no vacuum removes its files.

    Where nothing can be written beside the table there is no lease: whoever can only read it has no vacuum.
    """
    with _announced(url, kind="reader", version=version, purpose=purpose, seconds=seconds):
        yield


@contextmanager
def write_lease(url: str, *, purpose: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Announce that this process writes files for the table at `url`: no vacuum removes any meanwhile.

    Unlike appenders, any number of processes may write at a time; their commits decide.
    """
    with _announced(url, kind="writer", version=None, purpose=purpose, seconds=seconds):
        yield


@contextmanager
def write_leases(urls: Iterable[str], *, purpose: str) -> Iterator[None]:
    """Announce that this process writes files for all these tables."""
    with ExitStack() as stack:
        for url in urls:
            stack.enter_context(write_lease(url, purpose=purpose))
        yield


@contextmanager
def _announced(url: str, *, kind: str, version: int | None, purpose: str, seconds: float) -> Iterator[None]:
    """Hold one of any number of leases of a kind within the context."""
    mine = Lease(holder=holder_name(purpose), version=version, until=time.time() + seconds)
    # Named by holder and time: unlike appenders, any number of processes may hold one.
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", mine.holder)
    path = f"{_folder(url)}/{kind}-{name}-{time.time_ns()}.json"
    with suppress(StorageError):
        write_once(path, _serialized(mine))
    with _renewed(path, mine, seconds=seconds):
        yield


@contextmanager
def read_leases(parents: Iterable[Mapping[str, Any]], *, purpose: str) -> Iterator[None]:
    """Hold the tables among `parents` at their versions, as given by `Snapshot.lineage`."""
    with ExitStack() as stack:
        for parent in parents:
            if "table" in parent:
                stack.enter_context(read_lease(parent["table"], version=parent["version"], purpose=purpose))
        yield


def active_readers(url: str) -> list[Lease]:
    """The unexpired read leases on the table at `url`, the oldest version first."""
    active = [lease for lease in _active(url, kind="reader") if lease.version is not None]
    return sorted(active, key=lambda lease: (lease.version, lease.holder))


def active_writers(url: str) -> list[Lease]:
    """The unexpired leases of processes that write files for the table at `url`."""
    return list(_active(url, kind="writer"))


def _active(url: str, *, kind: str) -> Iterator[Lease]:
    for name in list_names(_folder(url)):
        if name.startswith(f"{kind}-"):
            lease = _read(f"{_folder(url)}/{name}")
            if lease is not None and not lease.expired:
                yield lease


def remove_expired(url: str) -> int:
    """Delete expired leases; returns how many."""
    filesystem, path = fsspec.core.url_to_fs(_folder(url))
    names = list_names(_folder(url))
    # The last append lease stays: the next one takes its number from it.
    last = [name for name in names if _APPEND_LEASE.search(name)][-1:]
    leases = {name: _read(f"{_folder(url)}/{name}") for name in names if name not in last}
    expired = [name for name, lease in leases.items() if lease is not None and lease.expired]
    for name in expired:
        filesystem.rm_file(f"{path}/{name}")
    return len(expired)


@contextmanager
def _renewed(path: str, lease: Lease, *, seconds: float) -> Iterator[None]:
    """Renew a lease in a thread within the context, and let it expire afterwards."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / 4):
            # One that fails is harmless: there are three more renewals before the lease expires.
            with suppress(StorageError):
                replace_object(path, _serialized(replace(lease, until=time.time() + seconds)))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(StorageError):  # it expires by itself
            replace_object(path, _serialized(replace(lease, until=0.0)))


def _serialized(lease: Lease) -> bytes:
    return json.dumps(asdict(lease), sort_keys=True).encode()


def _read(path: str) -> Lease | None:
    """A lease; None if it has been removed, or is not one of ours."""
    try:
        return Lease(**json.loads(read_bytes(path)))
    except (StorageError, ValueError, TypeError):
        return None


def _busy_message(url: str, lease: Lease) -> str:
    left = max(lease.until - time.time(), 0.0)
    return f"{url}: {lease.holder} is appending; its lease expires in {left:.0f} s unless it is renewed"


def _at_work_message(folder: str, lease: Lease) -> str:
    return f"{folder}: {lease.holder} is at work; wait until it ends, or stop it"


def _folder(url: str) -> str:
    return f"{url}.leases"
