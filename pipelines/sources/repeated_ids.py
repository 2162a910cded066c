"""Finds the rows of a list whose id came before, of more ids than fit in memory.

The ids' hashes are sorted part by part; the parts lie in temporary files.
"""

import hashlib
import tempfile
from typing import IO, Final

import numpy as np

_PARTS: Final = 64
_SPOOLED_BYTES: Final = 1 << 20
_RECORD: Final = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<i8")])


class RepeatedIds:
    """Collects the ids of a list in order, and then tells which of them came before."""

    def __init__(self) -> None:
        self._parts: list[IO[bytes]] = [
            tempfile.SpooledTemporaryFile(_SPOOLED_BYTES)  # noqa: SIM115 - closed by `repeats`
            for _ in range(_PARTS)
        ]

    def add(self, ordinal: int, id_: str) -> None:
        """Add the id of the next row that has one."""
        # Of 128 bits: among 10^8 ids two have one hash once in 10^22 lists.
        hashed = hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._parts[hashed[0] % _PARTS].write(hashed + ordinal.to_bytes(8, "little"))

    def repeats(self, *, count: int) -> np.ndarray:
        """Of the ordinals 0 .. count-1 one bit each, 1 where the id came before: uint8 [(count + 7) // 8]."""
        repeated = np.zeros(count, np.bool_)
        for part in self._parts:
            with part:
                part.seek(0)
                records = np.frombuffer(part.read(), _RECORD)
            # A stable sort, so the first of equal ids stays the first.
            records = records[np.lexsort((records["low"], records["high"]))]
            equal = [records[name][1:] == records[name][:-1] for name in ("high", "low")]
            repeated[records["ordinal"][1:][equal[0] & equal[1]]] = True
        return np.packbits(repeated)
