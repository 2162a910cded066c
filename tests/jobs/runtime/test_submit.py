"""Jobs as a cluster gets them: `ray job submit` to a head of their own, with a token."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import Head, ray_head

from pipelines.tables.table import open_table

SCENES = ("--set", "source.scenes=96", "--set", "source.scenes_per_shard=48")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Where two files are tested at a time, pytest's own folders have names too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="head-") as folder, ray_head(Path(folder)) as head:
        yield head


@pytest.fixture(scope="module")
def run(head: Head, tmp_path_factory) -> Path:
    """A run whose shards and LATENTS were made by submitted jobs."""
    out = tmp_path_factory.mktemp("run")
    for name in ("render_scenes", "encode_latents"):
        code, printed = head.submit(name, f"jobs.{name}", "--out", str(out), *SCENES)
        assert code == 0, printed
        assert f"Job '{name}' succeeded" in printed
    return out


@pytest.mark.ray
def test_submitted_jobs_do_their_work_from_a_small_package(head: Head, run: Path):
    assert open_table(str(run / "latents")).num_rows == 96
    (package,) = (path for path in head.folder.rglob("_ray_pkg_*") if path.is_dir())
    carried = {path.name for path in package.iterdir()}
    assert {"jobs", "pipelines", "snapfusion", "pyproject.toml"} <= carried
    assert not carried & {".git", ".venv", "runs", "docs", "tests"}
    assert sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) < 24e6


@pytest.mark.ray
def test_a_submission_id_is_a_key_against_submitting_twice(head: Head, run: Path):
    before = open_table(str(run / "latents")).version
    code, printed = head.submit("encode_latents", "jobs.encode_latents", "--out", str(run), *SCENES)
    assert code != 0
    assert "already exists" in printed
    assert open_table(str(run / "latents")).version == before


@pytest.mark.ray
def test_a_job_that_fails_says_why_in_its_last_lines_and_the_command_fails(head: Head, run: Path):
    code, printed = head.submit(
        "fails", "jobs.encode_latents", "--out", str(run), *SCENES, "--set", "latents.rows_per_unit=7"
    )
    assert code != 0
    assert "rows_per_unit is 64 there, 7 here" in "\n".join(printed.splitlines()[-12:])
    assert "Traceback" not in printed


@pytest.mark.ray
def test_nobody_without_the_token_submits(head: Head, run: Path):
    unknown = head.environment | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "f" * 32}
    code, printed = head.submit("stranger", "jobs.encode_latents", "--out", str(run), environment=unknown)
    assert code != 0
    assert re.search("[Uu]nauthorized|[Ii]nvalid authentication|403|401", printed)
