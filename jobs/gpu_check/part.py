"""Runs one part of the check, and writes its result.

python -m jobs.gpu_check.part PART SIZE FOLDER
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from jobs.gpu_check.commands import measure_rates, measure_table5, run_tests
from jobs.gpu_check.generation import measure_generation
from jobs.gpu_check.settings import SIZES, CheckSize, PartName, PartSkipped, SizeName
from jobs.gpu_check.sharing import measure_fsdp, measure_nccl
from jobs.gpu_check.tables import measure_tables
from jobs.gpu_check.training import measure_training
from pipelines.storage.objects import replace_object

MEASURES: dict[PartName, Callable[[CheckSize, Path], dict[str, Any]]] = {
    "tests": run_tests,
    "generation": measure_generation,
    "tables": measure_tables,
    "training": measure_training,
    "fsdp": measure_fsdp,
    "nccl": measure_nccl,
    "table5": measure_table5,
    "rates": measure_rates,
}


def run_part(name: PartName, size: CheckSize, folder: Path) -> None:
    """Measure, and write FOLDER/PART.json."""
    torch.set_num_threads(1)
    began = time.monotonic()
    work = folder / name
    work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"part": name, "size": size.name}
    try:
        record |= {"status": "done", "result": MEASURES[name](size, work)}
    except PartSkipped as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    record["seconds"] = round(time.monotonic() - began, 1)
    replace_object(str(folder / f"{name}.json"), json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    part, size_name, where = sys.argv[1:]
    run_part(cast("PartName", part), SIZES[cast("SizeName", size_name)], Path(where))
