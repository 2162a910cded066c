"""Lists of figures as JSON: the planner's own, by name, or the user's, by path or URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pipelines.storage.objects import StorageError, read_bytes
from snapfusion.settings import Settings, SettingsError

ListKind = Literal["prices", "rates"]
"""The folder that they are shipped in, and the setting that names them."""

_FOLDER = Path(__file__).parent / "lists"
_Read = TypeVar("_Read", bound=Settings)


def list_names(kind: ListKind) -> list[str]:
    """Of the lists that are shipped."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.json"))


def read_list(settings: type[_Read], name: str, *, kind: ListKind) -> _Read:
    """The list of that name, else the one at that path or URL.

    Raises:
        SettingsError: if there is none, or it is something else; says which.
    """
    option = f"--set plan.{kind}={name}"
    place = str(_FOLDER / kind / f"{name}.json") if name in list_names(kind) else name
    try:
        values = json.loads(read_bytes(place))
    except StorageError:
        raise SettingsError(
            f"{option}: there is no such file; a path, a URL or {', '.join(list_names(kind))} is accepted"
        ) from None
    except ValueError as error:
        raise SettingsError(f"{option}: it is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{option}: it is no object of JSON")
    try:
        return settings.parse(values)
    except SettingsError as error:
        raise SettingsError(f"{option}: {error}") from None
