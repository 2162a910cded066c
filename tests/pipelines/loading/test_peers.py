"""Rows a CPU-second of this project's loader and of others, on the same rows; part of `make bench`.

20,480 rows of SD's latents and token ids, on a warm disk, shuffled, in batches of 64 and on one thread. Each
loader has a process of its own, with the environment variables of a training's worker, which reads an epoch
that is not counted, and then one in each turn.
The others are installed into a folder of their own, without what they require where that is installed here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from test_checked_reading import make

from jobs.training.trainer import WORKER_VARIABLES
from pipelines.tables.settings import CHECK_FILES_VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SCRIPT, ROOT = Path(__file__).with_name("peer_loaders.py"), Path(__file__).parents[3]
PACKAGES = (
    *("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==3.6.0", "pylance==14.0.2"),
    *("webdataset==1.0.2", "braceexpand==0.1.7", "mosaicml-streaming==0.13.0", "catalogue==2.0.10"),
    *("brotli==1.2.0", "cramjam==2.14.0", "python-snappy==0.7.3", "zstd==1.5.7.2"),
    "numpy==2.1.3",  # below 2.2, as mosaicml-streaming asks
)
PEERS = ("datasets", "pyarrow", "lance", "mosaicml-streaming", "webdataset")
OWN = {"own-8": "0", "own-64": "0", "own-8 checked": "1", "own-64 checked": "1"}
"""Windows of 8 and 64 units, and whether the checksums of pages are compared."""
TURNS = 3


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables under which the other packages can be imported."""
    folder = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*install, *PACKAGES], check=True)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, environment):
    """The rows in every format."""
    folder = tmp_path_factory.mktemp("rows")
    make(folder / "latents", units=80, rows=256)
    subprocess.run([sys.executable, SCRIPT, "write", folder], check=True, env=os.environ | environment)
    return folder


def start(name: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """The process of a loader."""
    own = {"PYTHONPATH": str(ROOT), CHECK_FILES_VARIABLE: OWN.get(name, "0")}
    shared = os.environ | WORKER_VARIABLES | {"OMP_NUM_THREADS": "1"}
    variables = shared | (own if name in OWN or name == "pyarrow" else environment)
    command = [sys.executable, SCRIPT, name.split()[0], folder]
    return subprocess.Popen(
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def epoch(process: subprocess.Popen[str]) -> dict[str, float]:
    """What an epoch costs."""
    process.stdin.write("\n")
    # Some packages print lines of their own.
    return json.loads(next(line for line in process.stdout if line.startswith("{")))


def summary(costs: list[dict[str, float]]) -> dict[str, object]:
    """Figures of a loader: the epoch that is not counted, then the others."""
    rates = [round(one["rows"] / one["cpu_seconds"]) for one in costs]
    return {
        "rows_per_cpu_second": rates[1:],
        "of_first_epoch": rates[0],
        "first_batch_seconds": round(median(one["first_batch_seconds"] for one in costs[1:]), 3),
        "peak_mib": costs[-1]["peak_mib"],
    }


def line(name: str, found: dict) -> str:
    """A row of the table in docs/training.md."""
    rates = found["rows_per_cpu_second"]
    figures = f"{median(rates):,.0f} | {min(rates):,} .. {max(rates):,} | {found['of_first_epoch']:,}"
    return f"| {name} | {figures} | {found['first_batch_seconds']:.2f} | {found['peak_mib']:,} |"


def test_loader_beside_others(folder, environment, tmp_path, capsys):
    costs = {name: [] for name in (*OWN, *PEERS)}
    processes = {name: start(name, folder, environment) for name in costs}
    try:
        # In turn, since the machine drifts.
        for _ in range(1 + TURNS):
            for name, process in processes.items():
                costs[name].append(epoch(process))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    [total] = {round(one["sum"], 3) for each in costs.values() for one in each}
    assert total > 0
    found = {name: summary(each) for name, each in costs.items()}
    (tmp_path / "loaders.json").write_text(json.dumps(found, indent=1) + "\n")
    with capsys.disabled():
        print("\n| loader | rows a CPU-second | spread | first epoch | first batch, s | peak MiB |")
        print("\n".join(line(name, each) for name, each in found.items()))
        print(tmp_path / "loaders.json")
    rates = {name: median(each["rows_per_cpu_second"]) for name, each in found.items()}
    for name in ("lance", "mosaicml-streaming", "webdataset"):
        assert min(rates[own] for own in OWN) > rates[name]
