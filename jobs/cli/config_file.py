"""Reads a YAML file of settings into assignments, as --set takes them."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from snapfusion.settings import SettingsError, flatten


class _Loader(yaml.SafeLoader):
    """Refuses doubled keys, and reads 1e-4 as a number, which YAML 1.1 takes for a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are strings and stand there once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise SettingsError(f"the key {key!r} is no string")
            if keys.count(key) > 1:
                raise SettingsError(f"the key {key} stands there twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: str | None) -> list[str]:
    """Assignments `key=value` of a YAML file, in its order; none without a file.

    Raises:
        SettingsError: if the file cannot be read, is no mapping, or has a key twice.
    """
    if path is None:
        return []
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        if not isinstance(values, dict):
            raise SettingsError("a mapping of settings is accepted, as `snapfusion recipes mini` prints it")
        assignments = dict[str, str]()
        for key, value in flatten(values):
            if key in assignments:
                raise SettingsError(f"the key {key} stands there twice")
            assignments[key] = json.dumps(value)
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: {' '.join(str(error).split())}") from None
    return [f"{key}={value}" for key, value in assignments.items()]
