"""Print infra/constraints.txt: the version of every direct dependency that this environment holds.

.venv/bin/python infra/pin.py > infra/constraints.txt
"""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

# aiobotocore (below s3fs) holds botocore back, and pip would try one boto3 (below moto) after the other.
INDIRECT = ["boto3"]

HEADER = """\
# Versions that are known to work together: `make check` passed with exactly these.
# `make setup` installs under these constraints; pyproject.toml says what is accepted beyond them.
#
# To renew: make an environment without this file, check it, and write down what it holds:
#   make clean && python3 -m venv .venv && .venv/bin/pip install -e '.[dev,mobile,lora,serve]'
#   touch .venv/installed
#   make check && .venv/bin/python infra/pin.py > infra/constraints.txt
"""


def direct_dependencies() -> list[str]:
    """Names in [project.dependencies] and in the extras that `make setup` installs, sorted."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["dev"], *extras["mobile"], *extras["lora"], *extras["serve"]]
    return sorted({Requirement(line).name for line in listed}, key=str.lower)


if __name__ == "__main__":
    pins = [f"{name}=={version(name)}" for name in sorted([*direct_dependencies(), *INDIRECT], key=str.lower)]
    print(HEADER + "\n".join(pins))  # noqa: T201 - its output is the file
