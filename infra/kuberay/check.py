"""Hold the manifests here to KubeRay's own definitions: python infra/kuberay/check.py FOLDER...

Each FOLDER is named after a release of KubeRay and holds its custom resource definitions, ray.io_*.yaml:
those of `ray-operator/config/crd/bases` in its repository, or what `kubectl get crd rayjobs.ray.io -o yaml`
says. They are not kept here. A cluster drops keys that it does not know without a word; here they are errors.
That this is so is tried on every manifest, with each of its keys misspelled and each of its numbers made a
list.

What was checked is written to checked.json, by hash; a test refuses manifests that were changed since.
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


def manifests() -> list[Path]:
    """The manifests of this folder."""
    return sorted(HERE.glob("*.yaml"))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an `openAPIV3Schema`, which refuses the keys that a cluster would drop."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {
        key: schema[key]
        for key in ("type", "enum", "required", "minimum", "maximum", "pattern")
        if key in schema
    }
    if "properties" in schema:
        made["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def schema_of(manifest: dict[str, Any], definitions: Path) -> dict[str, Any]:
    """The schema of a manifest's kind and version.

    Raises:
        ValueError: if the folder does not define it.
    """
    group, _, version = manifest["apiVersion"].partition("/")
    for path in definitions.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        if (spec["group"], spec["names"]["kind"]) != (group, manifest["kind"]):
            continue
        (found,) = (
            entry["schema"]["openAPIV3Schema"] for entry in spec["versions"] if entry["name"] == version
        )
        made = strict(found)
        # Every object has metadata, which a definition does not describe.
        made["properties"]["metadata"] = {"type": "object"}
        return made
    raise ValueError(f"{definitions} does not define {manifest['kind']} of {manifest['apiVersion']}")


def spoiled(value: Any) -> Iterator[Any]:  # noqa: ANN401 - any JSON value
    """Copies of a manifest, each with one mistake: a key misspelled, or a number that is a list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # The keys below these are names that anybody may choose.
            free = key in {"metadata", "labels", "rayStartParams", "nodeSelector", "requests", "limits"}
            yield {name + "x" * (name == key): each for name, each in value.items()}
            if not (free or key == "clusterSelector"):
                yield from ({**value, key: wrong} for wrong in spoiled(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            for wrong in spoiled(inner):
                changed = copy.copy(value)
                changed[place] = wrong
                yield changed
    elif isinstance(value, int):
        yield [value]


def check(manifest: dict[str, Any], definitions: Path) -> int:
    """Hold one manifest to the definitions of a release; returns how many mistakes were tried and refused.

    Raises:
        jsonschema.ValidationError: if it does not fit.
        ValueError: if a mistake was not noticed.
    """
    validator = jsonschema.Draft202012Validator(schema_of(manifest, definitions))
    validator.validate(manifest)
    tried = 0
    for wrong in spoiled(manifest):
        tried += 1
        if validator.is_valid(wrong):
            raise ValueError(f"a mistake is not noticed in {json.dumps(wrong)}")
    return tried


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Check every manifest against every folder, and write down what was checked."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)
    checked: dict[str, Any] = {"manifests": {path.name: sha256(path) for path in manifests()}, "releases": {}}
    for folder in folders:
        for path in manifests():
            tried = check(yaml.safe_load(path.read_text()), folder)
            print(f"{path.name} fits KubeRay {folder.name}; {tried} mistakes in it were refused")  # noqa: T201 - what it is run for
        checked["releases"][folder.name] = {
            path.name: sha256(path) for path in sorted(folder.glob("ray.io_*.yaml"))
        }
    CHECKED.write_text(json.dumps(checked, indent=2) + "\n")


if __name__ == "__main__":
    main()
