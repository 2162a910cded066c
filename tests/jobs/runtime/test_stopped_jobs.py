"""Stops or kills drivers, local and submitted; the next run of the command continues."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_nodes import REPOSITORY, Head, processes, ray_head
from scene_latents import data_files, encode_scenes, pairs_of
from set_options import set_options

from pipelines.tables.table import is_table, open_table
from snapfusion.training.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

ROWS = 96
PAIRS = ("pairs.rows_per_unit=8", "pairs.draws=2", "pairs.bounds.commit_seconds=0")
UNITS = 2 * ROWS // 8
TRAINING = (
    *("vpred.loop.num_steps=160", "vpred.loop.global_batch=8", "vpred.trainer.checkpoint_every=20"),
    *("vpred.loader.held_out=0.2", "vpred.trainer.curve_every=20", "vpred.trainer.heartbeat_seconds=5"),
)


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They look for a killed head for about a minute, and hold no resources."""


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A run with LATENTS, read only."""
    out = tmp_path_factory.mktemp("latents")
    encode_scenes(out, count=ROWS)
    return out


@pytest.fixture
def run(latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(latents, tmp_path / "run"))


def local(command: list[str]) -> subprocess.Popen[str]:
    """A driver with its own cluster; all its processes have a mark in their environment."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=os.environ | {"TEST_MARK": command[command.index("--out") + 1]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_by_signal(process: subprocess.Popen[str], number: int, *, run: Path) -> tuple[str, float]:
    """Output of a local driver that a signal ends, and seconds until then; checks that no process is left."""
    began = time.monotonic()
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    deadline = time.monotonic() + 60
    marked = f"TEST_MARK={run}"
    while left := [words for _, words in processes(marked) if not words[0].startswith(AGENTS)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    return printed, seconds


def await_progress(done: Callable[[], int], process: subprocess.Popen[str]) -> int:
    """Wait until more is done than now; returns how much."""
    before, deadline = done(), time.monotonic() + 200
    while (now := done()) <= before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def units(run: Path) -> int:
    return len(open_table(str(run / "pairs")).units) if is_table(str(run / "pairs")) else 0


def assert_equals_undisturbed(run: Path, alone: Path) -> None:
    """PAIRS equal those that one process generates, in bytes and rows."""
    assert data_files(run / "pairs") == pairs_of(alone / "latents", alone / "pairs", PAIRS)
    manifests = open_table(str(run / "pairs")).manifests()
    assert sum(manifest.rows_read for manifest in manifests.values()) == 2 * ROWS


@dataclass
class Interruptions:
    """A job that is ended in several ways, and the progress that it makes.

    Attributes:
        command: the job.
        done: the finished part of its work.
        head: that runs the submitted ones.
        run: its run.
        capsys: for what is measured.
    """

    command: list[str]
    done: Callable[[], int]
    head: Head
    run: Path
    capsys: pytest.CaptureFixture[str]

    def show(self, line: str) -> None:
        with self.capsys.disabled():
            print(f"\n{line}")

    def signal_drivers(self) -> int:
        """End two local drivers by SIGTERM and Ctrl-C; returns what was done before the second."""
        verb = self.command[0].removeprefix("jobs.")
        for number, code, how in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
            driver = local(self.command)
            stood = await_progress(self.done, driver)
            printed, seconds = end_by_signal(driver, number, run=self.run)
            self.show(f"{verb}, {how}: over after {seconds:.1f} s with {stood} done")
            assert driver.returncode == code
            assert printed.splitlines()[-1] == f"{verb}: {how}; run the same command again to go on"
            assert "Traceback" not in printed
            assert "SIGTERM" not in printed  # Ray's core prints it with a stack.
            assert self.done() >= stood
        return stood

    def kill_and_resubmit(self, name: str) -> int:
        """Kill a submitted driver, and submit the job again to its end; returns what the killed one did."""
        submitted = self.head.start(name, *self.command)
        stood = await_progress(self.done, submitted)
        killed = time.monotonic()
        (driver,) = (
            pid
            for pid, words in processes()
            if words[1:3] == ["-m", self.command[0]] and str(self.run) in words
        )
        os.kill(driver, signal.SIGKILL)
        printed, _ = submitted.communicate(timeout=60)
        assert submitted.returncode == 1
        assert f"Job '{name}' failed" in printed
        noticed, left = time.monotonic() - killed, self.done()
        assert stood <= left

        resubmitted = self.head.start(f"{name}-again", *self.command)
        await_progress(self.done, resubmitted)
        lost = time.monotonic() - killed
        printed, _ = resubmitted.communicate(timeout=300)
        assert resubmitted.returncode == 0, printed
        self.show(
            f"{self.command[0]}, driver killed with {stood} done: reported after {noticed:.1f} s; submitted "
            f"again, it went on {lost:.1f} s after the kill"
        )
        return left


def test_stopped_generation_continues(head: Head, run: Path, tmp_path: Path, capsys):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.generate_pairs", "--out", str(run), *set_options(PAIRS)]
    submitted = head.start("stopped", *command)
    await_progress(lambda: units(run), submitted)
    subprocess.run(head.job("stop", "stopped"), env=head.environment, check=True, capture_output=True)
    printed, _ = submitted.communicate(timeout=60)
    # Ray returns 0 to a command that follows a stopped job; scripts check the status for "succeeded".
    assert submitted.returncode == 0
    assert "Job 'stopped' was stopped" in printed
    assert "generate_pairs: terminated; run the same command again to go on" in printed
    assert "Traceback" not in printed
    assert "was stopped" in status(head, "stopped")
    assert "succeeded" not in status(head, "stopped")

    stood = Interruptions(command, lambda: units(run), head, run, capsys).signal_drivers()
    assert stood <= units(run) < UNITS
    code, printed = head.submit("resumed", *command)
    assert code == 0, printed
    assert "succeeded" in status(head, "resumed")
    assert_equals_undisturbed(run, alone)


def test_killed_generation_continues_under_another_id(head: Head, run: Path, tmp_path: Path, capsys):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.generate_pairs", "--out", str(run), *set_options(PAIRS)]
    driver = local(command)
    await_progress(lambda: units(run), driver)
    end_by_signal(driver, signal.SIGKILL, run=run)
    assert driver.returncode == -signal.SIGKILL
    job = Interruptions(command, lambda: units(run), head, run, capsys)
    assert job.kill_and_resubmit("killed") < UNITS
    assert_equals_undisturbed(run, alone)


def status(head: Head, name: str) -> str:
    """Output of `ray job status`."""
    result = subprocess.run(
        head.job("status", name), env=head.environment, check=True, capture_output=True, text=True
    )
    return result.stdout + result.stderr


def step(run: Path) -> int:
    """Step of the newest complete checkpoint."""
    newest = CheckpointStore(str(run / "vpred.training/unet")).newest()
    return newest.step if newest else 0


def test_stopped_or_killed_training_gives_equal_weights(head: Head, run: Path, tmp_path: Path, capsys):
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    command = ["jobs.finetune_vpred", "--out", str(run), *set_options(TRAINING)]
    undisturbed = head.start("undisturbed", *(word.replace(str(run), str(alone)) for word in command))
    job = Interruptions(command, lambda: step(run), head, run, capsys)
    job.signal_drivers()
    assert job.kill_and_resubmit("training") < 160
    printed, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, printed
    stopped, expected = (json.loads((one / "vpred/metrics.json").read_text()) for one in (run, alone))
    for figure in ("weights", "evaluation", "curve"):
        assert stopped[figure] == expected[figure]
