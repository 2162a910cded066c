"""What differs between the settings a thing was made with and those it is asked for with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(found: Any, wanted: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON values
    """Each value that differs between two JSON values, as "loop.seed was 0, is 1"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key), wanted.get(key), f"{path}.{key}".strip("."))
    elif found != wanted:
        yield f"{path} was {found!r:.60}, is {wanted!r:.60}"
