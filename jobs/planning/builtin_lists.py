"""Reads lists of prices or rates: built-in ones by name, the user's by path or URL."""

import json
from pathlib import Path
from typing import ClassVar, Literal, Self

from pipelines.storage.objects import StorageError, read_bytes
from snapfusion.settings import Settings, SettingsError

_FOLDER = Path(__file__).parent / "lists"


class NamedList(Settings):
    """A list of prices or rates.

    Attributes:
        kind: folder of the built-in lists, and the setting of the planner that names one.
        name: stated beside every forecast.
        about: origin of the numbers, in a line.
    """

    kind: ClassVar[Literal["prices", "rates"]]
    name: str
    about: str

    @classmethod
    def builtin_names(cls) -> list[str]:
        """Names of the built-in lists."""
        return sorted(path.stem for path in (_FOLDER / cls.kind).glob("*.json"))

    @classmethod
    def read(cls, name: str) -> Self:
        """The built-in list of that name, or the one at that path or URL.

        Raises:
            SettingsError: if there is no such file, or it is not of that kind.
        """
        option, builtin = f"--set plan.{cls.kind}={name}", cls.builtin_names()
        try:
            content = read_bytes(str(_FOLDER / cls.kind / f"{name}.json") if name in builtin else name)
        except StorageError:
            raise SettingsError(
                f"{option}: there is no such file; a path, a URL or {', '.join(builtin)} are accepted"
            ) from None
        try:
            return cls.parse(json.loads(content))
        except ValueError as error:
            raise SettingsError(f"{option}: it holds no {cls.kind} ({error})") from None
