"""The parts that are commands of their own: tests, Table 5, and the planner's probe."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jobs.cli.job import Job, resolve_recipe
from jobs.gpu_check.settings import CheckSize
from jobs.gpu_check.tables import as_options, run_job, settings, write_images
from jobs.planning.probe import probe
from snapfusion.models.network_sizes import network_sizes

RATES = "rates.json"
"""The file of rates, for --set plan.rates."""
_TESTS = Path("tests")


def run_tests(size: CheckSize, folder: Path) -> dict[str, Any]:
    """Numbers of the tests marked gpu.

    Raises:
        RuntimeError: if one fails, or if this is no checkout.
    """
    if not _TESTS.is_dir():
        raise RuntimeError("there is no folder tests here: run it in a checkout of the repository")
    report = folder / "tests.xml"
    options = ["-q", "-m", "gpu", f"--device={size.device}", f"--junit-xml={report}", str(_TESTS)]
    code = subprocess.run([sys.executable, "-m", "pytest", *options], check=False).returncode
    if code:
        raise RuntimeError(f"pytest -m gpu ended with {code}; its lines are in the part's log")
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    return {name: int(suite.attrib[name]) for name in ("tests", "skipped")}


def measure_table5(size: CheckSize, folder: Path) -> dict[str, Any]:
    """The record of `measure_efficiency`."""
    assignments = [
        f"model={size.model}",
        f"efficiency.device={size.device}",
        f"efficiency.precision={size.precision}",
        "efficiency.turns=5",
    ]
    options = ["--recipe", size.recipe, "--out", str(folder / "run"), *as_options(assignments)]
    run_job("measure_efficiency", options)
    path = folder / f"run/efficiency/torch-{size.precision}-{size.device}.json"
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def measure_rates(size: CheckSize, folder: Path) -> dict[str, Any]:
    """The rates of the planner's probe, which are also written as `RATES`."""
    shards = folder / "shards"
    write_images(size, shards)
    recipe = resolve_recipe(size.recipe, settings(size, shards))
    rates = probe(Job(verb="plan", recipe=recipe, out=str(folder)), sizes=network_sizes(size.model))
    (folder / RATES).write_text(f"{rates.to_json()}\n")
    values: dict[str, Any] = rates.to_values()
    return values
