"""CPU-seconds until a command answers. `make bench` prints them beside an interpreter that imports torch."""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "--help of a verb": ("-m", "jobs.encode_latents", "--help"),
    "refused setting": ("-m", "jobs.encode_latents", "--set", "latents.bogus=1"),
    "dry run of a cheap job": ("-m", "jobs.distill_steps", "--dry-run", "--out", "{out}"),
    "snapfusion --help": ("-m", "jobs.command", "--help"),
    "import torch": ("-c", "import torch"),
}
MOST = {
    "--help of a verb": 0.5,
    "refused setting": 0.5,
    "dry run of a cheap job": 0.5,
    "snapfusion --help": 0.3,
}


def cpu_seconds(*words: str) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    return used() - before


@pytest.mark.slow
def test_commands_answer_at_once(tmp_path):
    medians = {}
    for name, words in COMMANDS.items():
        filled = [word.format(out=tmp_path / "run") for word in words]
        medians[name] = statistics.median(cpu_seconds(*filled) for _ in range(5))
        print(f"{name}: {medians[name]:.2f} CPU-s")
    assert {name: medians[name] for name, most in MOST.items() if medians[name] > most} == {}
