"""Validate the manifests here against KubeRay's own definitions: python infra/kuberay/check.py FOLDER...

Each FOLDER is named after a release of KubeRay and contains its custom resource definitions, ray.io_*.yaml:
those of `ray-operator/config/crd/bases` in its repository, or the output of `kubectl get crd rayjobs.ray.io
-o yaml`. They are not stored here. A cluster silently drops unknown keys; here they are errors. To show that
the validation is effective, every manifest is also validated with each key misspelled and each number
replaced by a list.

The hashes of what was checked are written to checked.json; a test refuses manifests that have changed since.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

HERE = Path(__file__).parent
CHECKED = HERE / "checked.json"
_COPIED = ("type", "enum", "required", "minimum", "maximum", "pattern")
# Below these keys users choose the names.
_FREE_NAMES = {
    "metadata",
    "labels",
    "rayStartParams",
    "nodeSelector",
    "requests",
    "limits",
    "clusterSelector",
}


def manifests() -> list[Path]:
    """The manifests of this folder."""
    return sorted(HERE.glob("*.yaml"))


def strict_schema(definition: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an `openAPIV3Schema`, with unknown keys refused."""
    if definition.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    schema: dict[str, Any] = {key: definition[key] for key in _COPIED if key in definition}
    if "properties" in definition:
        schema["properties"] = {name: strict_schema(each) for name, each in definition["properties"].items()}
        if not definition.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    for key in ("additionalProperties", "items"):
        if isinstance(definition.get(key), dict):
            schema[key] = strict_schema(definition[key])
    return schema


def schema_of(manifest: dict[str, Any], definitions: Path) -> dict[str, Any]:
    """The schema of a manifest's kind and version.

    Raises:
        ValueError: if the folder does not define it.
    """
    group, _, version = manifest["apiVersion"].partition("/")
    for path in definitions.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        if (spec["group"], spec["names"]["kind"]) == (group, manifest["kind"]):
            (definition,) = (each for each in spec["versions"] if each["name"] == version)
            schema = strict_schema(definition["schema"]["openAPIV3Schema"])
            # Every object has metadata, which a definition does not describe.
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    raise ValueError(f"{definitions} does not define {manifest['kind']} of {manifest['apiVersion']}")


def with_mistakes(value: Any) -> Iterator[Any]:  # noqa: ANN401 - any JSON value
    """Copies of a manifest, each with one mistake: a misspelled key, or a list in place of a number."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name + "x" * (name == key): each for name, each in value.items()}
            if key not in _FREE_NAMES:
                yield from ({**value, key: wrong} for wrong in with_mistakes(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for wrong in with_mistakes(inner):
                changed = copy.copy(value)
                changed[index] = wrong
                yield changed
    elif isinstance(value, int):
        yield [value]


def check(manifest: dict[str, Any], definitions: Path) -> int:
    """Validate one manifest against a release; returns how many mistakes were tried and refused.

    Raises:
        jsonschema.ValidationError: if it is invalid.
        ValueError: if a mistake was not noticed.
    """
    validator = jsonschema.Draft202012Validator(schema_of(manifest, definitions))
    validator.validate(manifest)
    count = 0
    for wrong in with_mistakes(manifest):
        count += 1
        if validator.is_valid(wrong):
            raise ValueError(f"a mistake is not noticed in {json.dumps(wrong)}")
    return count


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Check every manifest against every folder, and record what was checked."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    checked: dict[str, Any] = {"manifests": {path.name: sha256(path) for path in manifests()}, "releases": {}}
    for folder in folders:
        for path in manifests():
            count = check(yaml.safe_load(path.read_text()), folder)
            print(f"{path.name} is valid for KubeRay {folder.name}; {count} mistakes in it were refused")  # noqa: T201
        definitions = sorted(folder.glob("ray.io_*.yaml"))
        checked["releases"][folder.name] = {path.name: sha256(path) for path in definitions}
    CHECKED.write_text(json.dumps(checked, indent=2) + "\n")


if __name__ == "__main__":
    main()
