"""Leases on a table: whose turn it is to append, and who still reads which version.

They lie beside the table, in `<table>.leases/`, and end by themselves when nobody renews them: a holder that
was killed blocks nobody for longer than `LEASE_SECONDS`. They save work and files; they decide nothing. What is
committed, and that once, is decided by the table's log alone, so a lease that two hold at a time (a clock
that is minutes off, a process that slept) costs double work and no row.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

import fsspec

from pipelines.storage.objects import (
    StorageError,
    absolute_url,
    list_names,
    read_bytes,
    replace_object,
    write_once,
)

LEASE_SECONDS: Final = 600.0
"""How long a lease holds without being renewed; it is renewed after a quarter of that."""

_TURN = re.compile(r"turn-(\d{8})\.json$")


class TableBusy(RuntimeError):
    """Another process has the turn; says which, and until when."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a holder said when it last renewed.

    Attributes:
        holder: a name for people: host, process, and what for.
        version: of the table that is read; None for a turn to append.
        until: seconds of the epoch; over when it is past.
    """

    holder: str
    version: int | None
    until: float

    @property
    def over(self) -> bool:
        """Whether nobody holds it any more."""
        return self.until <= time.time()


def holder_name(purpose: str) -> str:
    """A holder's name: where it runs, and what for."""
    return f"{purpose} on {socket.gethostname()}, process {os.getpid()}"


@contextmanager
def append_lease(url: str, *, purpose: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Have the turn to append to the table at `url`, as long as the context lasts.

    Each turn is an object of its own, numbered on, which only one process can make.

    Raises:
        Busy: if another process has it.
    """
    folder, number = _folder(url), 0
    for place in list_names(folder):
        number = max(number, int(found[1]) if (found := _TURN.search(place)) else 0)
    last = _read(f"{folder}/turn-{number:08d}.json") if number else None
    if last is not None and not last.over:
        raise TableBusy(_busy_message(url, last))
    place = f"{folder}/turn-{number + 1:08d}.json"
    mine = Lease(holder=holder_name(purpose), version=None, until=time.time() + seconds)
    if not write_once(place, _serialized(mine)) and _read(place) != mine:
        raise TableBusy(_busy_message(url, _read(place)))
    with _renewed(place, mine, seconds=seconds):
        yield


@contextmanager
def read_lease(url: str, *, version: int, purpose: str, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold a version of the table at `url`: what it needs is not cleaned away while the context lasts.

    Where nothing can be written beside the table nothing is held: who may only read it does not clean it.
    """
    mine = Lease(holder=holder_name(purpose), version=version, until=time.time() + seconds)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", mine.holder)
    place = f"{_folder(url)}/reader-{name}-{time.time_ns()}.json"
    with suppress(StorageError):
        write_once(place, _serialized(mine))
    with _renewed(place, mine, seconds=seconds):
        yield


@contextmanager
def read_leases(parents: Iterable[Mapping[str, Any]], *, purpose: str) -> Iterator[None]:
    """Hold the tables among `parents` at their versions, as `Snapshot.lineage` tells them."""
    with ExitStack() as stack:
        for parent in parents:
            if "table" in parent:
                stack.enter_context(read_lease(parent["table"], version=parent["version"], purpose=purpose))
        yield


def active_readers(url: str) -> list[Lease]:
    """The leases on versions of the table at `url` that are not over, the oldest version first."""
    folder = _folder(url)
    found = (_read(f"{folder}/{name}") for name in list_names(folder) if name.startswith("reader-"))
    held = [lease for lease in found if lease is not None and not lease.over and lease.version is not None]
    return sorted(held, key=lambda lease: (lease.version, lease.holder))


def remove_expired(url: str) -> int:
    """Delete the leases that are over, but for the last turn, whose number the next one follows."""
    folder, removed = _folder(url), 0
    filesystem, path = fsspec.core.url_to_fs(folder)
    names = list_names(folder)
    turns = [name for name in names if _TURN.search(name)]
    for name in names:
        lease = None if name in turns[-1:] else _read(f"{folder}/{name}")
        if lease is not None and lease.over:
            filesystem.rm_file(f"{path}/{name}")
            removed += 1
    return removed


@contextmanager
def _renewed(place: str, lease: Lease, *, seconds: float) -> Iterator[None]:
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / 4):
            try:
                replace_object(place, _serialized(_until(lease, time.time() + seconds)))
            except StorageError:
                continue  # three more tries before it ends

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(StorageError):  # it ends by itself
            replace_object(place, _serialized(_until(lease, 0.0)))


def _until(lease: Lease, until: float) -> Lease:
    return Lease(holder=lease.holder, version=lease.version, until=until)


def _serialized(lease: Lease) -> bytes:
    return json.dumps(asdict(lease), sort_keys=True).encode()


def _read(place: str) -> Lease | None:
    """A lease; None if it was removed meanwhile, or is no lease of ours."""
    try:
        return Lease(**json.loads(read_bytes(place)))
    except (StorageError, ValueError, TypeError):
        return None


def _busy_message(url: str, lease: Lease | None) -> str:
    who = "another process" if lease is None else lease.holder
    left = 0.0 if lease is None else max(lease.until - time.time(), 0.0)
    return f"{url}: {who} is appending; its lease ends in {left:.0f} s unless it renews it"


def _folder(url: str) -> str:
    return f"{absolute_url(url)}.leases"
