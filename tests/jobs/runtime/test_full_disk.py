"""A full disk ends a job with exit code 1 and its reason, and leaves a run that a second try completes."""

import subprocess
import sys
from pathlib import Path

import pytest

# In a mount namespace of its own, the script sees a small disk that ends with it.
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
_MOUNT = 'mount -t tmpfs -o "size=$1k" tmpfs "$2" && shift 2 && exec "$@"'

SCRIPT = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from deletion_run import Run, make_shards
from jobs import render_scenes
from jobs.runtime.exit_codes import run_guarded
from snapfusion.training.checkpoint import CheckpointStore

disk, teacher = Path(sys.argv[1]), os.environ["TEACHER"]
run = Run(disk / "run", teacher=teacher)
SCENES = ["--out", str(disk / "scenes"), "--set", "source.scenes=4"]
weights = {"model": {"weight": torch.zeros(3000)}}
STEPS = {
    "shards": lambda: make_shards(run.out / "shards"),
    "latents": lambda: run.encode(),
    "checkpoint": lambda: CheckpointStore(str(disk / "store"), keep=1).save(1, tensors=weights, values={}),
    "settings": lambda: exit_code(render_scenes.main(SCENES)),
}

def exit_code(code):
    if code:
        raise SystemExit(code)

def full_at(free):
    status = os.statvfs(disk)
    with (disk / "filling").open("wb") as file:
        file.write(bytes(max(status.f_bavail * status.f_frsize - free, 0)))

for name, step in STEPS.items():
    codes = []
    for pages in (0, 2, 6, 10, 12):
        full_at(4096 * pages)
        try:
            codes.append(run_guarded(name, step))
        except SystemExit as ended:
            codes.append(ended.code)
        (disk / "filling").unlink()
    assert run_guarded(name, step) == 0
    print("step", name, *codes, flush=True)
print("step rows", run.table("latents").num_rows)
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_outlived(tiny_teacher: str, tmp_path: Path) -> None:
    mounted = [*_NAMESPACE, "sh", "-c", _MOUNT, "sh"]
    if subprocess.run([*mounted, "64", str(tmp_path), "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    command = [*mounted, "4096", str(tmp_path), "env", f"TEACHER={tiny_teacher}"]
    command += [sys.executable, "-c", SCRIPT, str(tmp_path), *sys.path]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    *steps, rows = [line.split()[1:] for line in ended.stdout.splitlines() if line.startswith("step ")]
    for name, first, *codes in steps:
        assert first == "1", name
        assert set(codes) <= {"0", "1"}, (name, codes)
    assert rows == ["rows", "18"]
    lines = ended.stderr.splitlines()
    assert lines
    assert all("No space left on device" in line for line in lines), ended.stderr
