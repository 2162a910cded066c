"""Reads lists of prices or rates: built-in ones by name, the user's by path or URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pipelines.storage.objects import StorageError, read_bytes
from snapfusion.settings import Settings, SettingsError

ListKind = Literal["prices", "rates"]
"""Folder of the built-in lists, and the setting that names one."""

_FOLDER = Path(__file__).parent / "lists"
_Read = TypeVar("_Read", bound=Settings)


def list_names(kind: ListKind) -> list[str]:
    """Names of the built-in lists."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.json"))


def read_list(settings: type[_Read], name: str, *, kind: ListKind) -> _Read:
    """The built-in list of that name, or the one at that path or URL.

    Raises:
        SettingsError: if there is no such file, or it is not of that kind.
    """
    option = f"--set plan.{kind}={name}"
    url = str(_FOLDER / kind / f"{name}.json") if name in list_names(kind) else name
    try:
        values = json.loads(read_bytes(url))
    except StorageError:
        raise SettingsError(
            f"{option}: there is no such file; a path, a URL or {', '.join(list_names(kind))} are accepted"
        ) from None
    except ValueError as error:
        raise SettingsError(f"{option}: it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{option}: it is not a JSON object")
    try:
        return settings.parse(values)
    except SettingsError as error:
        raise SettingsError(f"{option}: {error}") from None
