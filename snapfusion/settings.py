"""Base class of all settings: typed, frozen, unknown keys rejected, hashed by value.

A recipe is a tree of `Settings` subclasses, which the `settings.py` of each package defines.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

FOLDER_NAME = r"^[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,99}$"
"""A name that becomes a file or folder below another one: no path, hidden file or parent folder."""


class SettingsError(ValueError):
    """An unknown setting, or a value of the wrong type or out of range."""


class Settings(BaseModel):
    """Frozen, strictly typed values: numbers are finite, and strings are never converted to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain JSON values.

        Raises:
            SettingsError: for the first unknown key or invalid value.
        """
        try:
            # By way of JSON, in which strict mode accepts a list for a tuple.
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise SettingsError(_explain(error, cls)) from None

    def with_values(self, assignments: Iterable[str]) -> Self:
        """Return a copy changed by assignments such as ``pairs.draws=4``.

        Values are parsed as JSON; what is not JSON is a string.

        Raises:
            SettingsError: for a malformed assignment, an unknown key or an invalid value.
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a tree of settings with its dotted key, such as ``loop.seed``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(values: Any) -> str:  # noqa: ANN401 - any JSON value
    """SHA-256 of a JSON value in canonical form, 64 hexadecimal digits."""
    # Tables and checkpoints store these digests: changing the form would orphan every committed run.
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(stored: Any, current: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON values
    """Describe each difference of two JSON values, such as ``loop.seed is 0 there, 1 here``.

    "There" is the stored result, "here" the present run.
    """
    if isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(stored.keys() | current.keys()):
            yield from differences(stored.get(key), current.get(key), f"{path}.{key}".strip("."))
    elif stored != current:
        yield f"{path} is {_short(stored)} there, {_short(current)} here"


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return _cut(json.dumps(value), limit=40)


def _cut(text: str, *, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _parse_value(text: str) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class _PartialSection(dict[str, Any]):
    """An assigned mapping. What it leaves out stands at its default, and may be assigned afterwards."""


def _assign(values: dict[str, Any], *, path: str, value: Any) -> None:  # noqa: ANN401
    *parents, last = path.split(".")
    node: Any = values
    is_partial = False
    for depth, key in enumerate([*parents, last]):
        is_partial |= isinstance(node, _PartialSection)
        if not isinstance(node, dict) or (key not in node and not is_partial):
            known = ", ".join(sorted(node)) if isinstance(node, dict) else "nothing below it"
            parent = ".".join(path.split(".")[:depth]) or "the recipe"
            raise SettingsError(f"{path}: {parent} has no setting {key!r}; it has {known}")
        if depth < len(parents):
            node = node.setdefault(key, {})
    node[last] = _PartialSection(value) if isinstance(value, dict) else value


def _explain(error: ValidationError, cls: type[Settings]) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or cls.__name__
    if first["type"] == "extra_forbidden":
        return f"{path}: no such setting"
    # What is missing is not given; and of a whole section its own validator names the wrong values.
    is_named = first["type"] == "missing" or (
        first["type"] == "value_error" and isinstance(first["input"], dict)
    )
    given = "" if is_named else f", given {_cut(repr(first['input']))}"
    return f"{path}: {first['msg'].removeprefix('Value error, ')}{given}"
