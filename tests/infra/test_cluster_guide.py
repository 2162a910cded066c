"""docs/cluster.md agrees with the code and the files that it names."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from jobs.recipes.registry import recipe_named
from pipelines.ray_data import metrics

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/cluster.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
JOBS = [line for line in COMMANDS if "python -m jobs." in line]


@pytest.mark.parametrize("line", JOBS, ids=lambda line: re.search(r"jobs\.\w+", line)[0])
def test_a_job_and_its_settings_exist(line):
    words = shlex.split(line.split("python -m ")[1])
    assert (ROOT / words[0].replace(".", "/")).with_suffix(".py").exists()
    values = dict(zip(words[1::2], words[2::2], strict=False))
    settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
    recipe = recipe_named(values.get("--recipe", "mini")).with_values(settings)
    # A pool that was given labels keeps what else the recipe says of it.
    for setting in settings:
        if "labels" in setting:
            assert '"role"' in setting
            assert setting.split("=")[0].endswith(".labels")
    assert recipe.name == values.get("--recipe", "mini")


def test_roles_of_jobs_are_in_the_cluster_file():
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    roles = {role for line in JOBS for role in re.findall(r'"role": "(\w+)"', line)}
    assert roles == {"decode", "teacher", "trainer"} == types.keys() - {"head"}


def test_named_files_exist():
    for name in re.findall(r"(?<![\w/.])(?:infra|docs|pipelines)/[\w./-]+\w", GUIDE):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!http)([\w./-]+)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target


def test_every_policy_is_used():
    used = set(re.findall(r"infra/aws/(\w+\.json)", "\n".join(COMMANDS)))
    assert used == {path.name for path in (ROOT / "infra/aws").glob("*.json")}


def test_lifecycle_rules_are_as_described():
    lifecycle = json.loads((ROOT / "infra/aws/lifecycle.json").read_text())
    rules = {rule["ID"]: rule for rule in lifecycle["Rules"]}
    sentence = GUIDE.split("The lifecycle rules")[1].split("snapfusion/")[0]
    days = [int(number) for number in re.findall(r"\b(\d+) days", sentence)]
    assert days == [
        rules["uploads-that-nobody-finished"]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"],
        rules["versions-that-were-replaced-or-deleted"]["NoncurrentVersionExpiration"]["NoncurrentDays"],
        rules["runs-that-were-only-tried"]["Expiration"]["Days"],
    ]


def test_the_table_of_metrics_is_complete():
    documented = set(re.findall(r"^\| `(ray_\w+)` \|", GUIDE, re.MULTILINE))
    counters = (metrics.ROWS, metrics.STAGE_SECONDS, metrics.TRAINING_STEPS, metrics.TRAINING_SECONDS)
    assert documented == {*(f"ray_{name}_total" for name in counters), f"ray_{metrics.TRAINING_RUNS}"}


def test_the_named_releases_were_checked():
    for release in json.loads((ROOT / "infra/kuberay/checked.json").read_text())["releases"]:
        assert release.removeprefix("v") in GUIDE
