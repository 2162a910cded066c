"""Typed settings: unknown keys are refused, and the resolved values have a hash.

A setting stands beside the code it configures, as a subclass of `Settings`; a recipe is a tree of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class SettingsError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message says which and why."""


class Settings(BaseModel):
    """Frozen, fully typed values. Numbers must be finite, and a string is never read as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Settings from plain values, as JSON gives them.

        Raises:
            SettingsError: for the first key that is unknown or value that is not accepted.
        """
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise SettingsError(_explain(error, cls)) from None

    def with_values(self, assignments: Iterable[str]) -> Self:
        """A copy changed by assignments such as ``pairs.draws=4``; values are JSON, or else plain text.

        Raises:
            SettingsError: for a malformed assignment, an unknown key or a value that is not accepted.
        """
        values = self.to_values()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals or not path:
                raise SettingsError(f"{assignment!r} is not of the form key=value")
            _assign(values, path=path, value=_parse_value(text))
        return type(self).parse(values)

    def to_values(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The settings as indented JSON with sorted keys."""
        return json.dumps(self.to_values(), indent=2, sort_keys=True)

    def digest(self) -> str:
        """SHA-256 of the resolved settings, 64 hexadecimal digits."""
        return digest(self.to_values())


def digest(values: Any) -> str:  # noqa: ANN401 - any JSON value
    """SHA-256 of a JSON value in its one canonical spelling, 64 hexadecimal digits."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(found: Any, wanted: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON values
    """What differs between the settings a thing was made with and those it is asked for with.

    Each difference of two JSON values in words: ``loop.seed is 0 there, 1 here``.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key), wanted.get(key), f"{path}.{key}".strip("."))
    elif found != wanted:
        yield f"{path} is {_short(found)} there, {_short(wanted)} here"


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _parse_value(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], *, path: str, value: Any) -> None:  # noqa: ANN401
    *parents, last = path.split(".")
    place: Any = values
    for depth, key in enumerate([*parents, last]):
        if not isinstance(place, dict) or key not in place:
            known = ", ".join(sorted(place)) if isinstance(place, dict) else "nothing below it"
            where = ".".join(path.split(".")[:depth]) or "the recipe"
            raise SettingsError(f"{path}: {where} has no setting {key!r}; it has {known}")
        if depth < len(parents):
            place = place[key]
    place[last] = value


def _explain(error: ValidationError, cls: type[Settings]) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or cls.__name__
    given = "" if first["type"] in ("missing", "extra_forbidden") else f", given {first['input']!r}"
    said = "no such setting" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{path}: {said}{given}"
