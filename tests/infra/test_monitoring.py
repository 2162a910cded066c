"""Prometheus rules and the dashboard without a cluster; test_cluster_run.py has one."""

import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlparse

import monitoring_names as names
import pytest
import yaml

from jobs.recipes.registry import recipe_named
from pipelines import stages
from pipelines.ray_data import metrics

ROOT = Path(__file__).parents[2]
COUNTERS = (metrics.ROWS, metrics.STAGE_SECONDS, metrics.TRAINING_STEPS, metrics.TRAINING_SECONDS)
OURS = {*(f"ray_{name}_total" for name in COUNTERS), f"ray_{metrics.TRAINING_RUNS}"}
RAYS = {
    "ray_cluster_active_nodes",
    "ray_cluster_idle_nodes",
    "ray_node_disk_utilization_percentage",
    "ray_node_mem_total",
    "ray_node_mem_used",
}
"""What is read of Ray's own metrics."""


@pytest.mark.parametrize("expression", names.expressions().values(), ids=names.expressions())
def test_expressions_read_existing_metrics(expression):
    read = {name for name, _ in names.selected(expression)}
    assert read <= OURS | RAYS | names.recorded()
    # None was overlooked in it.
    assert read == set(re.findall(r"\b(?:ray_|snapfusion:)\w+", expression))


def test_invalid_promql_is_refused():
    with pytest.raises(ValueError, match="parenthesis"):
        list(names.selected("sum(rate(ray_snapfusion_rows_total[5m])"))


def test_every_metric_is_used():
    assert names.scraped().keys() == OURS | RAYS


def test_stages_and_outcomes_in_expressions_exist():
    code = "".join(path.read_text() for path in Path(stages.__file__).parent.glob("*.py"))
    expressions = "\n".join(names.expressions().values())
    used = {name for listed in re.findall(r'stage=~"([^"]+)"', expressions) for name in listed.split("|")}
    assert used <= set(re.findall(r"^class (\w+)", code, re.MULTILINE))
    assert set(re.findall(r'outcome!?="([^"]+)"', expressions)) <= {metrics.WRITTEN}
    states = set(re.findall(r'state="(\w+)"', expressions))
    assert states == {"starting", "waiting", "busy"}
    assert all(f'"{state}"' in inspect.getsource(metrics) for state in states)


def test_every_type_of_node_has_a_price():
    aws = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    kubernetes = yaml.safe_load((ROOT / "infra/kuberay/cluster.yaml").read_text())["spec"]
    groups = {group["groupName"] for group in kubernetes["workerGroupSpecs"]}
    prices = [rule for rule in names.rules() if rule.get("record") == "snapfusion:price_dollars_per_hour"]
    priced = [rule["labels"]["node_type"] for rule in prices]
    # KubeRay's name for the head's group.
    assert sorted(priced) == sorted(aws.keys() | groups | {"headgroup"})


def test_alerts_have_a_summary_and_an_action():
    alerts = [rule for rule in names.rules() if "alert" in rule]
    assert len(alerts) == 10
    for alert in alerts:
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert alert["annotations"].keys() == {"summary", "action"}
    advice = " ".join(alert["annotations"]["action"] for alert in alerts)
    recipe = recipe_named("mini").to_values()
    assert "`latents.readers.actors`" in advice
    assert "actors" in recipe["latents"]["readers"]
    assert "`bounds.max_rejected` (0.5 by default)" in advice
    assert recipe["latents"]["bounds"]["max_rejected"] == 0.5


def test_the_dashboard_has_its_panels():
    dashboard = json.loads((names.MONITORING / "dashboard.json").read_text())
    panels = dashboard["panels"]
    titles = [panel["title"] for panel in panels]
    assert {"Rows a second", "Rejected share", "Teachers' idle share", "Step time"} <= set(titles)
    assert {"Data-wait share", "Cost so far"} <= set(titles)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert dashboard["templating"]["list"][0]["name"] == "datasource"
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
    covered = [cell for panel in panels for cell in cells(**panel["gridPos"])]
    assert len(covered) == len(set(covered))
    assert max(covered)[0] < 24


def cells(x, y, w, h):
    """The cells of the dashboard's grid that a panel covers."""
    return itertools.product(range(x, x + w), range(y, y + h))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, which comes with Prometheus")
@pytest.mark.parametrize("words", ["check config prometheus.yaml", "test rules rules_test.yaml"])
def test_prometheus_accepts_the_rules(words):
    command = ["promtool", *words.split()]
    done = subprocess.run(command, cwd=names.MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_made_up_series():
    made_up = (names.MONITORING / "rules_test.yaml").read_text()
    derived = {rule.get("alert") or rule["record"] for rule in names.rules()}
    assert {name for name in derived if name not in made_up} == {"snapfusion:price_dollars_per_hour"}


class Prometheus(BaseHTTPRequestHandler):
    """Answers every range query with one series, and records the queries."""

    queries: ClassVar[list[str]] = []

    def do_GET(self):
        parameters = {key: value for key, (value,) in parse_qs(urlparse(self.path).query).items()}
        self.queries.append(parameters["query"])
        values = [[float(parameters["end"]) - 60 * ago, str(ago)] for ago in range(3)]
        series = {"metric": {"verb": "encode_latents"}, "values": values}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"status": "success", "data": {"result": [series]}}).encode())

    def log_message(self, *words):
        pass


def test_the_dashboard_renders_without_grafana(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Prometheus)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    image = tmp_path / "dashboard.png"
    command = [sys.executable, str(names.MONITORING / "dashboard_image.py"), str(image), "30"]
    environment = {**os.environ, "PROMETHEUS_URL": f"http://127.0.0.1:{server.server_port}"}
    subprocess.run(command, env=environment, check=True)
    server.shutdown()
    server.server_close()
    assert image.read_bytes().startswith(b"\x89PNG")
    shown = [target["expr"] for panel in names.panels() for target in panel["targets"]]
    assert Prometheus.queries == [expression.replace("$__range", "1800s") for expression in shown]
