"""Drivers that are asked to stop, or killed, here and on a head: what stays, and that the next goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from in_process import in_process
from ray_nodes import REPOSITORY, Head, ray_head
from scene_latents import encode_scenes

from jobs.recipes.registry import recipe_named
from pipelines.datasets.pairs import captions_of, generate_pairs
from pipelines.tables.table import is_table, open_table
from snapfusion.training.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

ROWS = 96
PAIRS = ("pairs.rows_per_unit=8", "pairs.draws=2", "pairs.bounds.commit_seconds=0")
UNITS = 2 * ROWS // 8
TRAINING = (
    *("vpred.loop.num_steps=160", "vpred.loop.global_batch=8", "vpred.trainer.checkpoint_every=20"),
    *("vpred.loader.held_out=0.2", "vpred.trainer.curve_every=20"),
)


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They look for a head that was killed for about a minute, and hold nothing."""


def settings(assignments: tuple[str, ...]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A run with LATENTS; not to be changed."""
    out = tmp_path_factory.mktemp("latents")
    encode_scenes(out, count=ROWS)
    return out


@pytest.fixture
def run(latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(latents, tmp_path / "run"))


def local(command: list[str]) -> subprocess.Popen[str]:
    """A driver with a cluster of its own; everything it starts has a mark in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=os.environ | {"TEST_MARK": command[command.index("--out") + 1]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], number: int, *, run: Path) -> tuple[str, float]:
    """What a local driver said until the signal ended it, and in how many seconds; nobody of its is left."""
    began = time.monotonic()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    took = time.monotonic() - began
    deadline = time.monotonic() + 60
    while left := [words for words in marked(run) if not words.startswith(AGENTS)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return printed, took


def marked(run: Path) -> Iterator[str]:
    """Living processes of a local driver of this run."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if f"TEST_MARK={run}".encode() in (folder / "environ").read_bytes():
                yield (folder / "cmdline").read_text()


def kill_submitted(verb: str, *, run: Path) -> None:
    """SIGKILL for the driver that the head runs."""
    (driver,) = (pid for pid, words in processes() if words[1:3] == ["-m", verb] and str(run) in words)
    os.kill(driver, signal.SIGKILL)


def processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield int(folder.name), (folder / "cmdline").read_text().split("\0")


def await_progress(done: Callable[[], int], process: subprocess.Popen[str]) -> int:
    """Wait until more is done than now; how much."""
    before, deadline = done(), time.monotonic() + 200
    while (now := done()) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def units(run: Path) -> int:
    return len(open_table(str(run / "pairs")).units) if is_table(str(run / "pairs")) else 0


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "pairs").glob("*.parquet")}


def assert_as_if_nobody_had_stopped_it(run: Path, alone: Path) -> None:
    """PAIRS hold what one process makes, bytes and rows."""
    recipe = recipe_named("mini").with_values([*PAIRS])
    generate_pairs(
        recipe.pairs,
        teacher="mini",
        captions=[*captions_of(open_table(str(alone / "latents")))],
        source=recipe.captions.name,
        url=str(alone / "pairs"),
        run=in_process,
    )
    assert files_of(run) == files_of(alone)
    assert (
        sum(account.rows_read for account in open_table(str(run / "pairs")).manifests().values()) == 2 * ROWS
    )


def test_generation_that_is_asked_to_stop_says_so_and_goes_on(head: Head, run: Path, tmp_path: Path, capsys):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.generate_pairs", "--out", str(run), *settings(PAIRS)]
    submitted = head.start("stopped", *command)
    await_progress(lambda: units(run), submitted)
    subprocess.run(head.job("stop", "stopped"), env=head.environment, check=True, capture_output=True)
    printed, _ = submitted.communicate(timeout=60)
    # Ray's own: whoever followed it has 0. A script asks for the status, and looks for "succeeded".
    assert submitted.returncode == 0
    assert "Job 'stopped' was stopped" in printed
    assert "generate_pairs: terminated; run the same command again to go on" in printed
    assert "Traceback" not in printed
    assert "was stopped" in status(head, "stopped")
    assert "succeeded" not in status(head, "stopped")

    for number, code, how in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        driver = local(command)
        stood = await_progress(lambda: units(run), driver)
        printed, took = ended(driver, number, run=run)
        with capsys.disabled():
            print(f"\ngeneration, {how}: over after {took:.1f} s with {stood} of {UNITS} units")
        assert driver.returncode == code
        assert printed.splitlines()[-1] == f"generate_pairs: {how}; run the same command again to go on"
        assert "Traceback" not in printed
        assert "SIGTERM" not in printed  # as Ray's core says, with a stack of its own

    assert stood <= units(run) < UNITS
    code, printed = head.submit("resumed", *command)
    assert code == 0, printed
    assert "succeeded" in status(head, "resumed")
    assert_as_if_nobody_had_stopped_it(run, alone)


def test_generation_whose_driver_is_killed_goes_on_under_another_id(
    head: Head, run: Path, tmp_path: Path, capsys
):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.generate_pairs", "--out", str(run), *settings(PAIRS)]
    driver = local(command)
    await_progress(lambda: units(run), driver)
    ended(driver, signal.SIGKILL, run=run)
    assert driver.returncode == -signal.SIGKILL

    submitted = head.start("killed", *command)
    stood = await_progress(lambda: units(run), submitted)
    killed = time.monotonic()
    kill_submitted("jobs.generate_pairs", run=run)
    printed, _ = submitted.communicate(timeout=60)
    assert submitted.returncode == 1
    assert "Job 'killed' failed" in printed
    told = time.monotonic() - killed

    resubmitted = head.start("killed-again", *command)
    await_progress(lambda: units(run), resubmitted)
    lost = time.monotonic() - killed
    printed, _ = resubmitted.communicate(timeout=300)
    with capsys.disabled():
        print(
            f"\ngeneration, driver killed with {stood} of {UNITS} units: told after {told:.1f} s; submitted "
            f"again, its first unit came {lost:.1f} s after the kill"
        )
    assert resubmitted.returncode == 0, printed
    assert stood < UNITS
    assert_as_if_nobody_had_stopped_it(run, alone)


def status(head: Head, name: str) -> str:
    """What `ray job status` says."""
    asked = subprocess.run(
        head.job("status", name), env=head.environment, check=True, capture_output=True, text=True
    )
    return asked.stdout + asked.stderr


def step(run: Path) -> int:
    """Of the newest checkpoint that is whole."""
    newest = CheckpointStore(str(run / "vpred.training/unet")).newest()
    return newest.step if newest else 0


def test_training_that_is_stopped_or_killed_goes_on_to_the_same_weights(
    head: Head, run: Path, tmp_path: Path, capsys
):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.finetune_vpred", "--out", str(run), *settings(TRAINING)]
    undisturbed = head.start("undisturbed", *(word.replace(str(run), str(alone)) for word in command))
    for number, code, how in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        driver = local(command)
        stood = await_progress(lambda: step(run), driver)
        printed, took = ended(driver, number, run=run)
        with capsys.disabled():
            print(f"\ntraining, {how}: over after {took:.1f} s at step {stood}")
        assert driver.returncode == code
        assert printed.splitlines()[-1] == f"finetune_vpred: {how}; run the same command again to go on"
        assert "Traceback" not in printed
        assert "SIGTERM" not in printed
        assert step(run) >= stood

    submitted = head.start("training", *command)
    stood = await_progress(lambda: step(run), submitted)
    killed = time.monotonic()
    kill_submitted("jobs.finetune_vpred", run=run)
    printed, _ = submitted.communicate(timeout=60)
    assert submitted.returncode == 1
    assert "Job 'training' failed" in printed

    assert stood <= step(run) < 160
    resubmitted = head.start("training-again", *command)
    await_progress(lambda: step(run), resubmitted)
    lost = time.monotonic() - killed
    printed, _ = resubmitted.communicate(timeout=300)
    assert resubmitted.returncode == 0, printed
    with capsys.disabled():
        print(
            f"\ntraining, driver killed at step {stood}: submitted again, its next checkpoint came "
            f"{lost:.1f} s after the kill"
        )

    printed, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, printed
    made, whole = (json.loads((one / "vpred/metrics.json").read_text()) for one in (run, alone))
    for figure in ("weights", "evaluation", "curve"):
        assert made[figure] == whole[figure]
