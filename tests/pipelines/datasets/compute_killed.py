"""A run that computes TARGETS and is killed at a named point; started by test_targets."""

import sys

from in_process import in_process
from synthetic_units import kill_at
from target_inputs import SETTINGS

from pipelines.datasets.targets import compute_targets
from pipelines.tables.table import open_table

if __name__ == "__main__":
    teacher, latents, url, point = sys.argv[1:]
    kill_at(point, after=4)
    settings = SETTINGS.with_values(["bounds.commit_seconds=0.0"])
    compute_targets(settings, teacher=teacher, latents=open_table(latents), url=url, run=in_process)
