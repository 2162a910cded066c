"""Write the run's report: one page with pictures, curves, figures and lineage, and metrics.json beside it.

Reads what the other jobs committed, and changes none of it. With a floor in the recipe, pictures that the
oracle cannot read make the job fail after the page is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import Job, run
from jobs.findings import collect
from jobs.report_page import build_report
from pipelines.storage import StorageError, is_local
from snapfusion.settings import SettingsError


class BelowFloor(RuntimeError):
    """Pictures that do not show what their captions say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.report`."""
    return run("report", report, preview=preview, about=__doc__, argv=argv)


def report(job: Job) -> None:
    """Write the page and the figures, then hold the pictures to the floor."""
    if not is_local(job.out):
        raise SettingsError(
            f"--out {job.out}: the report is written to a local folder; copy the run, or mount it"
        )
    content, metrics = collect(job)
    page, figures = Path(job.place("report/index.html")), Path(job.place("metrics.json"))
    build_report(content, page)
    try:
        partial = figures.with_name(f".{figures.name}")
        partial.write_text(json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n")
        partial.replace(figures)
    except OSError as error:
        raise StorageError(f"{figures} cannot be written: {error}") from None
    print(f"  open {page}")
    print(f"  and  {figures}")
    floor, oracle = job.recipe.oracle_floor, metrics.get("oracle")
    if floor is not None and oracle and oracle["mean_attributes_right"] < floor:
        raise BelowFloor(
            f"the oracle finds {oracle['mean_attributes_right']:.0%} of the captions' attributes in "
            f"{oracle['images']} pictures of the teacher, and the recipe's oracle_floor is {floor:.0%}: the "
            "model or its sampling is broken"
        )


def preview(job: Job) -> list[str]:
    """What would be written."""
    return [f"would write {job.place('report/index.html')} and {job.place('metrics.json')}"]


if __name__ == "__main__":
    sys.exit(main())
