"""Submits jobs with `ray job submit` and a token to a head of the test."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import Head, ray_head

from jobs import render_scenes
from pipelines.tables.table import open_table

SCENES = ("--set", "source.scenes=16", "--set", "source.scenes_per_shard=8")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # With parallel tests, pytest's folders have names too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="head-") as folder, ray_head(Path(folder)) as head:
        yield head


@pytest.fixture(scope="module")
def run(head: Head, tmp_path_factory) -> Path:
    """A run whose LATENTS a submitted job made."""
    out = tmp_path_factory.mktemp("run")
    assert render_scenes.main(["--out", str(out), *SCENES]) == 0
    code, printed = head.submit("encode_latents", "jobs.encode_latents", "--out", str(out), *SCENES)
    assert code == 0, printed
    assert "Job 'encode_latents' succeeded" in printed
    return out


@pytest.mark.ray
def test_submitted_jobs_run_from_a_small_package(head: Head, run: Path):
    assert open_table(str(run / "latents")).num_rows == 16
    (package,) = (path for path in head.folder.rglob("_ray_pkg_*") if path.is_dir())
    packaged = {path.name for path in package.iterdir()}
    assert {"jobs", "pipelines", "snapfusion", "pyproject.toml"} <= packaged
    assert not packaged & {".git", ".venv", "runs", "docs", "tests"}
    assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < 24e6


@pytest.mark.ray
def test_a_submission_id_is_accepted_once(head: Head, run: Path):
    before = open_table(str(run / "latents")).version
    code, printed = head.submit("encode_latents", "jobs.encode_latents", "--out", str(run), *SCENES)
    assert code != 0
    assert "already exists" in printed
    assert open_table(str(run / "latents")).version == before


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_job_ends_with_its_reason(head: Head, run: Path):
    code, printed = head.submit(
        "fails", "jobs.encode_latents", "--out", str(run), *SCENES, "--set", "latents.rows_per_unit=7"
    )
    assert code != 0
    assert "rows_per_unit is 64 there, 7 here" in "\n".join(printed.splitlines()[-12:])
    assert "Traceback" not in printed


@pytest.mark.ray
def test_submission_needs_the_token(head: Head, run: Path):
    unknown = head.environment | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "f" * 32}
    code, printed = head.submit("stranger", "jobs.encode_latents", "--out", str(run), environment=unknown)
    assert code != 0
    assert re.search("[Uu]nauthorized|[Ii]nvalid authentication|403|401", printed)


@pytest.mark.ray
def test_resources_that_a_cluster_lacks_are_waited_for(head: Head, run: Path):
    settings = ("--set", "pairs.teachers.gpus=1", "--set", "cluster.wait=0.05")
    code, printed = head.submit("no-gpu", "jobs.generate_pairs", "--out", str(run), *SCENES, *settings)
    assert code != 0
    needs = "pairs.teachers: 1 worker of 0.5 CPU, 1 GPU"
    assert f"waiting up to 0.05 min (cluster.wait) for {needs}" in printed
    reason = f"generate_pairs: the cluster has not offered {needs} within 0.05 min"
    assert reason in "\n".join(printed.splitlines()[-12:])
    assert "Traceback" not in printed
    assert not (run / "pairs").exists()
