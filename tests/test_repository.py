"""The repository's frame: make targets, constraints, cluster files, and a README that shows what is there."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs.cli.groups import GROUPS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLUSTER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
NODE_TYPES = CLUSTER["available_node_types"]
NAMED_FILE = re.compile(r"\b(?:tests|jobs|pipelines|snapfusion|infra)/[\w/]+\.(?:py|sh|md|yaml|toml|txt)")
GENERATED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
"""What commands leave here, such as the picture of README's second command."""


def direct_dependencies() -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["dev"], *extras["mobile"], *extras["lora"], *extras["serve"]]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def constraints() -> dict[str, str]:
    lines = (ROOT / "infra/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_direct_dependencies_are_pinned_in_accepted_range():
    pinned = constraints()
    for name, requirement in direct_dependencies().items():
        assert pinned[name] in requirement.specifier


def test_ray_brings_what_job_submission_and_training_need():
    assert direct_dependencies()["ray"].extras == {"default", "data", "train"}


def test_no_package_index_is_named():
    for name in (
        "pyproject.toml",
        "infra/constraints.txt",
        "infra/setup.sh",
        "infra/web/setup.sh",
        "Makefile",
        ".ci/run",
        "infra/Dockerfile",
    ):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), name


def test_setup_takes_pythons_that_documents_name():
    script = (ROOT / "infra/setup.sh").read_text()
    first, last = re.search(r"\(3, (\d+)\) <= \S+ <= \(3, (\d+)\)", script).groups()
    versions = [f"3.{minor}" for minor in range(int(first), int(last) + 1)]
    accepted = SpecifierSet(PROJECT["requires-python"])
    assert all(accepted.contains(version) for version in versions)
    listed = f"Python {', '.join(versions[:-1])} or {versions[-1]} with its venv"
    for name in ("README.md", "Makefile", "infra/setup.sh"):
        assert listed in " ".join((ROOT / name).read_text().split()), name
    assert " ".join(f"python{version}" for version in versions) in script


def test_compilers_for_phones_are_an_extra():
    extra = {one.name: one for one in map(Requirement, PROJECT["optional-dependencies"]["mobile"])}
    assert set(extra) == {"coremltools", "executorch", "onnx", "onnxruntime", "onnxscript"}
    assert not set(extra) & {Requirement(line).name for line in PROJECT["dependencies"]}
    marker = extra["coremltools"].marker
    assert [marker.evaluate({"python_version": version}) for version in ("3.13", "3.14")] == [True, False]
    for name in ("infra/setup.sh", "infra/Dockerfile"):
        assert re.search(r"-e '\.\[(dev,)?mobile,lora(,serve)?\]'", (ROOT / name).read_text()), name


def copy_of_setup(folder: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "infra/setup.sh", "infra/constraints.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def make_setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "setup", *arguments]
    return subprocess.run(command, cwd=copy_of_setup(folder), capture_output=True, text=True, check=False)


def test_setup_without_a_python_names_accepted_ones(tmp_path):
    done = make_setup(tmp_path, f"PYTHON={tmp_path}/none")
    assert "No Python 3.11, 3.12 or 3.13 with its venv module was found" in done.stderr
    assert f"tried: {tmp_path}/none" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_installs_the_given_torch_first(tmp_path):
    done = make_setup(tmp_path, f"PYTHON={sys.executable}", "TORCH=./no-torch.whl ./no-torchvision.whl")
    assert done.returncode != 0
    assert "Installing first: ./no-torch.whl ./no-torchvision.whl" in done.stdout
    assert "no-torch.whl" in done.stderr  # pip's own words
    assert "Obtaining" not in done.stdout
    assert not (tmp_path / ".venv/installed").exists()


def test_make_help_lists_every_target():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    # Under `make test` this make is a child, and would announce its folder.
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in shown.splitlines()} == targets
    assert {"setup", "demo", "test", "check", "bench", "help"} <= targets


@pytest.mark.parametrize("script", [".ci/run", "infra/setup.sh", "infra/web/setup.sh"])
def test_scripts_are_executable_and_stop_at_errors(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text()


def test_the_cluster_file_fits_rays_own_schema():
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(CLUSTER, json.loads(schema.read_text()))


def test_trainers_avoid_spot_and_tasks_avoid_head():
    on_spot = {name for name, kind in NODE_TYPES.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert on_spot == {"decode", "teacher"}
    assert NODE_TYPES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}


def test_nodes_have_rights_and_labels_of_role():
    for name, kind in NODE_TYPES.items():
        assert kind["labels"]["role"] == name
        profile = "snapfusion-head" if name == "head" else "snapfusion-node"
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": profile}


def test_cluster_has_room_for_every_worker_type():
    assert CLUSTER["max_workers"] == sum(kind.get("max_workers", 0) for kind in NODE_TYPES.values())


def test_images_run_the_ray_that_is_pinned():
    version = constraints()["ray"]
    assert CLUSTER["docker"]["image"].startswith(f"rayproject/ray:{version}-")
    assert f"FROM rayproject/ray:{version}-" in (ROOT / "infra/Dockerfile").read_text()
    kuberay = yaml.safe_load((ROOT / "infra/kuberay/cluster.yaml").read_text())
    assert kuberay["spec"]["rayVersion"] == version
    assert kuberay["spec"]["authOptions"] == {"mode": "token"}


def test_jobs_document_names_every_job():
    verbs = {verb for group in GROUPS.values() for verb in group}
    text = (ROOT / "docs" / "jobs.md").read_text()
    assert {verb for verb in verbs if not re.search(rf"`(?:snapfusion )?{verb}[ `]", text)} == set()
    assert set(re.findall(r"^\| `([a-z-]+)", text, re.MULTILINE)) <= verbs


def test_documents_name_files_that_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]
    named = {path for document in documents for path in NAMED_FILE.findall(document.read_text())}
    assert len(named) > 50
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_files_that_stand_for_tests_of_models_exist():
    text = (ROOT / "docs/models.md").read_text().partition("## What tests show")[2].partition("## Saved")[0]
    names = {name for line in text.splitlines() for name in re.findall(r"`([a-z_0-9]+)`", line)}
    names -= {"fp16", "non_ema", "trust_remote_code", "from_single_file", "load_lora_weights"}
    found = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(names) == 15
    assert {f"test_{name}" for name in names} <= found
