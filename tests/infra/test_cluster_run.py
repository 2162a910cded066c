"""The node types of ray_cluster.yaml under Ray's autoscaler, as processes of this machine.

Pools and trainers request labels, and the autoscaler starts nodes that have them. Meanwhile the nodes are
scraped as Prometheus would, by Ray's service discovery file.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monitoring_names
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray_nodes import SCRIPTS, await_ready, free_port

from pipelines.ray_data import metrics
from pipelines.tables.table import open_table

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ROWS = 40
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def configuration(address: str) -> dict[str, Any]:
    """ray_cluster.yaml with nodes of two CPUs of this machine."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    config["provider"] = {
        "type": "external",
        "module": PROVIDER,
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    types = config["available_node_types"]
    for kind in types.values():
        kind["node_config"] = {}
        if kind is not types[config["head_node_type"]]:
            kind["resources"] = {"CPU": 2}
    types[FAKE_HEAD_NODE_TYPE] = types.pop(config["head_node_type"])
    config |= {"head_node_type": FAKE_HEAD_NODE_TYPE, "file_mounts": {}}
    commands = ("initialization_commands", "head_setup_commands", "worker_setup_commands")
    return {**{key: [] for key in (*commands, "cluster_synced_files")}, **config}


@dataclass
class Outcome:
    """The output and the metrics of the run."""

    printed: str
    table: str
    labels: dict[str, set[str]] = field(default_factory=dict)
    """All labels of each metric, by metric."""
    counted: dict[str, float] = field(default_factory=dict)
    """Final number of rows by outcome."""
    node_types: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("c")
    address = f"{get_node_ip_address()}:{free_port()}"
    (folder / "config.json").write_text(json.dumps(configuration(address)))
    paths = [str(ROOT / "tests" / name) for name in ("", "infra", "pipelines", "jobs")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *paths]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_metrics_report_interval_ms": "1000",
    }
    autoscaler = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    ports = ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    command = [str(SCRIPTS / "ray"), "start", "--head", "--block", "--num-cpus=0", "--labels=role=head"]
    command += [f"--port={address.rpartition(':')[2]}", *(f"--{name}={free_port()}" for name in ports)]
    command += [f"--temp-dir={folder}/ray", f"--autoscaling-config={folder}/config.json"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment | autoscaler, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await_ready(lambda: "--block" in (folder / "head.log").read_text(), head)
        yield _run_work(folder, address, environment)
    finally:
        # The autoscaler's nodes are not in the head's process group, so they are found by this cluster's
        # folder in their command lines. `ray stop` would end every Ray of the machine.
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(3)
        for process in _processes(str(folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        head.wait()


def _run_work(folder: Path, address: str, environment: dict[str, str]) -> Outcome:
    """Run the work, and scrape all nodes meanwhile."""
    program = str(Path(__file__).with_name("cluster_work.py"))
    command = [sys.executable, program, address, str(folder), str(ROWS)]
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    outcome = Outcome(printed="", table=f"{folder}/table")
    deadline = time.monotonic() + 300
    while driver.poll() is None and time.monotonic() < deadline:
        _scrape(folder / "ray/prom_metrics_service_discovery.json", outcome)
        time.sleep(0.5)
    driver.kill()
    _scrape(folder / "ray/prom_metrics_service_discovery.json", outcome)
    outcome.printed = (folder / "driver.log").read_text()
    assert driver.wait() == 0, outcome.printed
    return outcome


def _scrape(discovery: Path, outcome: Outcome) -> None:
    with contextlib.suppress(OSError, ValueError):
        targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
        for target in targets:
            with contextlib.suppress(OSError):
                answer = urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode()
                _note(answer, outcome)


def _note(answer: str, outcome: Outcome) -> None:
    for family in text_string_to_metric_families(answer):
        for sample in family.samples:
            outcome.labels.setdefault(sample.name, set()).update(sample.labels)
            if sample.name == f"ray_{metrics.ROWS}_total":
                assert sample.labels["verb"] == "generate_pairs"
                outcome.counted[sample.labels["outcome"]] = sample.value
            if re.fullmatch("ray_cluster_(active|idle)_nodes", sample.name):
                outcome.node_types.add(sample.labels["node_type"])


def test_labels_start_nodes_for_pools_and_trainers(outcome):
    states = open_table(outcome.table).manifests().values()
    assert sum(account.rows_read for account in states) == ROWS
    assert {account.environment["role"] for account in states} == {"teacher"}
    assert "trained on trainer" in outcome.printed
    assert outcome.node_types == {FAKE_HEAD_NODE_TYPE, "teacher", "trainer"}


def test_every_metric_is_served_with_its_labels(outcome):
    expected = monitoring_names.scraped()
    assert expected.keys() <= outcome.labels.keys()
    for name, labels in expected.items():
        assert labels <= outcome.labels[name], name


def test_rows_are_counted_by_outcome(outcome):
    assert outcome.counted == {"written": ROWS * 4 / 5, "broken_image": ROWS / 5}


def _processes(folder: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found
