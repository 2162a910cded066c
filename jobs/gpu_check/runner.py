"""Runs the parts of the check one by one, each in a process of its own, unless its result is there."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.gpu_check.settings import PARTS, CheckSize, PartName
from jobs.runtime.logs import logger

_TIMEOUT_SECONDS = 3600.0


class CheckFailed(RuntimeError):
    """Parts that failed."""


def result_of(name: PartName, folder: Path) -> dict[str, Any] | None:
    """The record of a part, if there is one."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_parts(parts: Sequence[PartName], size: CheckSize, folder: Path) -> list[PartName]:
    """Run the parts that are not done; a part that was skipped is tried again. Returns those that failed."""
    failed = list[PartName]()
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts:
        found = result_of(name, folder)
        if found is not None and found["status"] == "done":
            logger.info(f"  {name}: done earlier, in {found['seconds']} s")
            continue
        logger.info(f"  {name}: {PARTS[name]}")
        began = time.monotonic()
        if not _ended_well(name, size, folder):
            failed.append(name)
            logger.info(f"  {name}: failed after {time.monotonic() - began:.0f} s, see {folder / name}.log")
        elif (record := result_of(name, folder)) is not None and record["status"] == "skipped":
            logger.info(f"  {name}: skipped: {record['reason']}")
        else:
            logger.info(f"  {name}: {time.monotonic() - began:.0f} s")
    return failed


def _ended_well(name: PartName, size: CheckSize, folder: Path) -> bool:
    command = [sys.executable, "-m", "jobs.gpu_check.part", name, size.name, str(folder)]
    (folder / f"{name}.json").unlink(missing_ok=True)
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == 0
