"""Write the run's report: one page with pictures, curves, figures and lineage, and metrics.json beside it.

Reads what the other jobs committed, and changes none of it. With a floor in the recipe, pictures that the
oracle cannot read make the job fail after the page is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jobs.cli.job import Job, run
from jobs.reports.collect import collect
from jobs.reports.run_page import render_report
from jobs.runtime.exit_codes import exit_process
from pipelines.storage.objects import replace_object


class BelowFloor(RuntimeError):
    """Pictures that do not show what their captions say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.report`."""
    return run("report", report, preview=preview, about=__doc__, argv=argv)


def report(job: Job) -> None:
    """Write the page and the figures, then hold the pictures to the floor."""
    content, metrics = collect(job)
    page, figures = job.url("report/index.html"), job.url("metrics.json")
    replace_object(page, render_report(content).encode())
    replace_object(figures, (json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
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
    return [f"would write {job.url('report/index.html')} and {job.url('metrics.json')}"]


if __name__ == "__main__":
    exit_process(main())
