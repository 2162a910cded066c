"""Resources that a cluster does not have: refused, or waited for, before anything is made."""

import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from jobs import (
    distill_steps,
    encode_latents,
    find_duplicates,
    render_scenes,
)
from jobs.cli.resources import demands_of
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.runtime import resources

ROOT = Path(__file__).parents[3]
SECTIONS = (
    *("latents", "pairs", "targets", "deduplication", "download", "evaluation", "evolution", "decoder"),
    *("vpred", "robust.training", "efficient.training", "distill", "random_baseline"),
)


def demands(name: str, section: str) -> dict[str, resources.Demand]:
    settings = recipe_named(name)
    for part in section.split("."):
        settings = getattr(settings, part)
    return {demand.setting: demand for demand in demands_of(settings, name=section)}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_section_with_workers_has_demands(name, section):
    assert demands(name, section)


def test_a_pipeline_needs_one_actor_of_each_pool():
    found = demands("sd15", "pairs")
    assert found["pairs.teachers"].bundles == ({"CPU": 1.0, "GPU": 1.0},)
    assert found["pairs"].total("GPU") == 1.0
    assert found["pairs"].total("CPU") == 2.0


def test_a_training_needs_all_its_workers_or_min_workers():
    whole = demands("sd15", "distill")["distill.trainer"]
    assert (len(whole.bundles), whole.total("GPU")) == (64, 64.0)
    recipe = recipe_named("sd15").with_values(["distill.trainer.min_workers=8"])
    (elastic,) = demands_of(recipe.distill, name="distill")
    assert elastic.total("GPU") == 8.0


@pytest.mark.parametrize("name", ["mini", "ablation", "mini-efficient"])
def test_the_miniatures_recipes_fit_a_laptop(name):
    for section in SECTIONS:
        resources.refuse_beyond_machine(list(demands(name, section).values()), cpus=4)


@pytest.mark.parametrize(
    ("verb", "setting", "message"),
    [
        (encode_latents, "latents.encoders.gpus=1", "latents.encoders: its workers need 1 GPUs"),
        (encode_latents, "latents.readers.cpus=99", "latents.readers: its workers need 99 CPUs"),
        (encode_latents, 'latents.writers.labels={"role": "writer"}', "has no label 'role'"),
        (find_duplicates, "deduplication.fingerprints.readers.gpus=1", "readers: its workers need 1 GPUs"),
        (distill_steps, "distill.trainer.use_gpu=true", "distill.trainer: its workers need 2 GPUs"),
    ],
)
def test_more_than_the_machine_has_is_refused(verb, setting, message, run, capsys, monkeypatch):
    monkeypatch.setattr(resources, "_num_gpus", lambda: 0)
    before = sorted(run.iterdir())
    assert verb.main(["--out", str(run), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{verb.main.name}: --set " in error
    assert message in error
    made = set(run.iterdir()) - set(before)
    assert {path.name for path in made} <= {"settings"}, "no table is left behind"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert render_scenes.main(["--out", str(folder), "--set", "source.scenes=2"]) == 0
    return folder


def refused_address(address: str, code: int = 1) -> str:
    """Output of a job that is to join this cluster, in a process that has no cluster yet."""
    script = (
        "from jobs.runtime.cluster import connect; from jobs.runtime.settings import ClusterSettings; "
        "from jobs.runtime.exit_codes import run_guarded; "
        f"exit(run_guarded('job', lambda: connect(ClusterSettings(address='{address}'))))"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_a_dead_cluster_address_is_one_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert f"job: no Ray cluster answers at {address} (" in refused_address(address)


def test_a_dashboards_address_is_explained():
    error = refused_address("http://127.0.0.1:8265", code=2)
    assert error.startswith("job: RAY_ADDRESS http://127.0.0.1:8265: this is a dashboard")


def test_an_address_of_something_else_is_one_line():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        error = refused_address(address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert f"job: no Ray cluster answers at {address} (what listens there is none)" in error


def test_rays_own_lines_do_not_show():
    script = """
import ray
from jobs.runtime.cluster import connect
from jobs.runtime.settings import ClusterSettings
connect(ClusterSettings(cpus=1))
print(ray.data.range(2).map(lambda row: row).count())
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ended.stdout, ended.stderr) == ("2\n", "")
