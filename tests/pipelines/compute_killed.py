"""A run that computes TARGETS and is killed at a named point; started by test_targets."""

from __future__ import annotations

import sys
from pathlib import Path

# Started as a script, this folder alone is on the path; `in_process` lies above it.
sys.path.append(str(Path(__file__).parents[1]))

from in_process import in_process
from synthetic_units import kill_at
from target_inputs import SETTINGS

from pipelines.tables import open_table
from pipelines.targets import compute_targets

if __name__ == "__main__":
    teacher, latents, url, point = sys.argv[1:]
    kill_at(point, after=4)
    settings = SETTINGS.with_values(["bounds.commit_seconds=0.0"])
    compute_targets(settings, teacher=teacher, latents=open_table(latents), url=url, run=in_process)
