"""The check of a job's package, before it is uploaded."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "submission.py"


def check(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_repository_is_small_enough():
    shown = check(ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "MiB of at most 100 MiB" in shown.stdout
    assert "tests/" not in shown.stdout


def test_a_large_file_is_named_unless_it_is_ignored(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "job.py").write_text("pass\n")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(101 << 20)
    shown = check(tmp_path)
    assert shown.returncode == 2
    assert shown.stdout.splitlines()[1].split() == ["101.0", "MiB", "weights.bin"]
    assert shown.stderr.count("\n") == 1
    (tmp_path / ".rayignore").write_text("*.bin\n")
    shown = check(tmp_path)
    assert (shown.returncode, "weights.bin" in shown.stdout) == (0, False)
