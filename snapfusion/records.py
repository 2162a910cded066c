"""JSON records that one program wrote and another reads: a fault in one is reported with the file's name."""

import json
import math
from typing import Any, NoReturn


class RecordError(ValueError, LookupError):
    """A JSON file that is damaged, holds no object, or lacks a key."""


class Record(dict[str, Any]):
    """An object of a JSON file; a key that is missing is an error that names the file."""

    name = ""

    def __missing__(self, key: str) -> NoReturn:
        raise RecordError(f"{self.name} has no {key!r}: it is damaged, or no file of this kind")


def parse_record(content: bytes | str, *, name: str) -> Record:
    """The object of a JSON file. Its numbers are finite, and the objects within it are records, too.

    Args:
        content: of the file.
        name: of the file, for errors.

    Raises:
        RecordError: if it is not JSON, no object, or has a number that is not finite.
    """

    def record(values: dict[str, Any]) -> Record:
        found = Record(values)
        found.name = name
        return found

    try:
        value = json.loads(content, object_hook=record, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise RecordError(f"{name} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"{name} is damaged: {error}") from None
    if not isinstance(value, Record):
        raise RecordError(f"{name} holds {type(value).__name__}; a JSON object is accepted")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds the number {text}; finite ones are accepted")
    return number
