"""Commands whose processes are all killed at random moments end with the bytes of an undisturbed run.

Part of `make bench`; SNAPFUSION_KILLS bounds the kills of each command.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import MOBILE, tiny_student
from ray_nodes import REPOSITORY, processes
from reported_run import make_pairs, make_student
from scene_latents import encode_scenes
from set_options import set_options

from snapfusion.models.save import save

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(7200)]

DISTILL = (
    *("distill.student=null", "distill.loop.num_steps=24", "distill.loop.global_batch=4"),
    *("distill.loader.held_out=0.25", "distill.trainer.checkpoint_every=4"),
    *("distill.trainer.heartbeat_seconds=1", "distill.steps.student_steps=4"),
)
# Core ML's tools write another specification in each process.
COMPILE = (*MOBILE, "mobile.coreml=[]", 'mobile.executorch=["float32"]')
_LOOP = "{num_steps: 4, global_batch: 4, warmup_steps: 0, ema_decay: 0.5}"
_TRAINER = "{num_workers: 1, micro_batch: 4, curve_every: 1, checkpoint_every: 1}"
PIPELINE = f"""
source: {{scenes: 16, scenes_per_shard: 8}}
latents.rows_per_unit: 4
latency.turns: 2
efficient.training.loop: {_LOOP}
efficient.training.loader.held_out: 0.25
efficient.training.trainer: {_TRAINER}
distill.loop: {_LOOP}
distill.loader.held_out: 0.25
distill.trainer: {_TRAINER}
captions.limit: 8
pairs.generation: {{steps: 2, guidance: 2.5, batch_size: 4}}
pairs.rows_per_unit: 4
decoder.loop: {_LOOP}
decoder.loader.held_out: 0.25
decoder.trainer: {_TRAINER}
mobile.executorch: [float32]
mobile.coreml: []
mobile.onnx: []
mobile.captions: [a large red circle at the top on a white background]
oracle_floor: null
"""
"""The recipe `mini`, each step small."""


def start(command: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    """A driver; it and all that it starts have `out` in their environment."""
    with printed_by(out).open("ab") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", *command, "--out", str(out)],
            cwd=REPOSITORY,
            env=os.environ | {"TEST_MARK": str(out)},
            stdout=printed,
            stderr=printed,
        )


def printed_by(out: Path) -> Path:
    """The file of what the drivers of `out` print."""
    return out.with_name(f"{out.name}.txt")


def kill_all(out: Path) -> None:
    """Kill the drivers of `out` and all that they started, as a lost machine does."""
    while found := [pid for pid, _ in processes(f"TEST_MARK={out}")]:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def files_of(out: Path, folder: str) -> dict[str, bytes]:
    """The files of a folder; of records only what does not depend on the time."""
    files = {}
    for path in sorted((out / folder).rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix in (".safetensors", ".pte", ".parquet", ".html", ".f32"):
            files[name] = path.read_bytes().replace(str(out).encode(), b"OUT")
        elif path.name == "metrics.json":
            record = json.loads(path.read_text())
            kept = ("weights", "weight_files", "evaluation", "curve", "tables", "student")
            values = {key: record[key] for key in kept if key in record}
            files[name] = json.dumps(values, sort_keys=True).replace(str(out), "OUT").encode()
    return files


def check_kills(
    inputs: Path,
    command: Sequence[str],
    *,
    made: Sequence[str],
    kills: int,
    show: Callable[[str], None],
    drivers: int = 1,
) -> None:
    """Kill a command at random moments, start it again each time, and compare what it makes in the end.

    Args:
        inputs: the run to start from, copied for each attempt.
        command: without --out.
        made: its folders in the run.
        kills: number of kills.
        show: prints a line.
        drivers: processes of the command that run at once.
    """
    kills = min(kills, int(os.environ.get("SNAPFUSION_KILLS", kills)))
    alone = Path(shutil.copytree(inputs, inputs.with_name("alone")))
    began = time.monotonic()
    assert start(command, alone).wait() == 0, printed_by(alone).read_text()
    duration = time.monotonic() - began
    expected = [files_of(alone, folder) for folder in made]
    assert all(expected)
    draws, killed, ends = random.Random(0), 0, 0
    while killed < kills or not ends:
        run = Path(shutil.copytree(inputs, inputs.with_name(f"run-{ends}")))
        while True:
            started = [start(command, run) for _ in range(drivers)]
            # After the last kill it runs to its end.
            limit = draws.uniform(0, duration) if killed < kills else None
            try:
                codes = [one.wait(limit) for one in started]
            except subprocess.TimeoutExpired:
                kill_all(run)
                killed += 1
                for one in started:
                    one.wait()
                continue
            kill_all(run)
            assert 0 in codes, printed_by(run).read_text()
            if codes == [0] * drivers:
                break
        ends += 1
        assert [files_of(run, folder) for folder in made] == expected
        shutil.rmtree(run)
    show(f"{command[0]}: {killed} kills in {ends} runs of {duration:.0f} s undisturbed, equal bytes")


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def printed(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return printed


def test_killed_distillation_ends_with_equal_weights(tmp_path, show):
    encode_scenes(tmp_path / "inputs")
    command = ["jobs.distill_steps", *set_options(DISTILL)]
    check_kills(tmp_path / "inputs", command, made=["student"], kills=30, show=show)


def test_killed_compilation_ends_with_equal_programs(tmp_path, show):
    save(tiny_student(seed=3), tmp_path / "model")
    (tmp_path / "inputs").mkdir()
    command = ["jobs.compile_mobile", str(tmp_path / "model"), *set_options(COMPILE)]
    check_kills(tmp_path / "inputs", command, made=["mobile"], kills=10, show=show)


def test_killed_report_ends_with_equal_pages(tmp_path, show):
    make_pairs(tmp_path / "inputs")
    make_student(tmp_path / "inputs")
    check_kills(
        tmp_path / "inputs",
        ["jobs.report", "--set", "oracle_floor=null"],
        made=["report"],
        kills=10,
        show=show,
    )


def test_two_killed_pipelines_in_one_run_end_with_equal_outputs(tmp_path, show):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    (tmp_path / "inputs").mkdir()
    check_kills(
        tmp_path / "inputs",
        ["jobs.run_pipeline", "--recipe", "mini", "--config", str(tmp_path / "pipeline.yaml")],
        made=["latents", "efficient", "student", "pairs", "decoder", "mobile"],
        kills=10,
        show=show,
        drivers=2,
    )
