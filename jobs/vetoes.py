"""What refuses rows of LATENTS beside the selection, by the recipe and by what lies in the run."""

from __future__ import annotations

from jobs.cli import Job
from pipelines.stages.blocklist import load_blocklist
from pipelines.stages.veto import Veto


def vetoes_of(job: Job) -> list[Veto]:
    """The vetoes under which this run encodes, and verifies what it encoded."""
    return [load_blocklist(job.recipe.source.blocklists)]
