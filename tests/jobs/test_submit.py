"""Jobs as a cluster gets them: `ray job submit` to a head of their own, with a token."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import in_process
from ray_nodes import REPOSITORY, Head, ray_head

from jobs.recipes import recipe_named
from pipelines.pairs import captions_of, generate_pairs
from pipelines.tables import accounts, is_table, open_table

SCENES = ("--set", "source.scenes=96", "--set", "source.scenes_per_shard=48")
# Twelve units of 50 steps: long enough to be stopped in the middle.
PAIRS = (*SCENES, "--set", "pairs.rows_per_unit=8", "--set", "pairs.bounds.commit_seconds=0")


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
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


def units_of(run: Path) -> int:
    return len(open_table(str(run / "pairs")).units) if is_table(str(run / "pairs")) else 0


def await_unit(run: Path, *, more_than: int, process: subprocess.Popen[str]) -> None:
    """Wait until a unit more is committed."""
    deadline = time.monotonic() + 200
    while units_of(run) <= more_than:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def drawn_in_process(run: Path) -> dict[str, bytes]:
    """The data files of PAIRS that this recipe gives, gone on with where it stands."""
    recipe = recipe_named("mini").with_values([word for word in PAIRS if word != "--set"])
    generate_pairs(
        recipe.pairs,
        teacher="mini",
        captions=[*captions_of(open_table(str(run / "latents")))],
        source=recipe.captions.name,
        url=str(run / "pairs"),
        run=in_process,
    )
    return {path.name: path.read_bytes() for path in (run / "pairs").glob("*.parquet")}


@pytest.mark.slow
@pytest.mark.ray
def test_what_was_stopped_and_interrupted_goes_on_to_the_same_bytes(head: Head, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "alone")
    command = ("jobs.generate_pairs", "--out", str(run), *PAIRS)
    submitted = head.start("pairs", *command)
    await_unit(run, more_than=0, process=submitted)
    subprocess.run(head.job("stop", "pairs"), env=head.environment, check=True, capture_output=True)
    printed, _ = submitted.communicate(timeout=60)
    assert "was stopped" in printed

    stood = units_of(run)
    local = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    await_unit(run, more_than=stood, process=local)
    local.send_signal(signal.SIGINT)
    printed, _ = local.communicate(timeout=60)
    assert local.returncode == 130
    assert printed.splitlines()[-1] == "generate_pairs: interrupted; run the same command again to go on"

    assert units_of(run) < 12
    assert drawn_in_process(run) == drawn_in_process(tmp_path / "alone")
    assert sum(account.rows_read for account in accounts(str(run / "pairs")).values()) == 96
