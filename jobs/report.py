"""Write the run's report: a page with images, curves, measurements and lineage, and metrics.json beside it.

Reads what the other jobs committed and changes none of it. If the recipe has a floor, images that the oracle
cannot read make the job fail after the page is written.
"""

import json

from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from pipelines.storage.objects import replace_object


class BelowFloor(RuntimeError):
    """Images that do not show their captions."""


def report(job: Job) -> None:
    """Write the page and the metrics, then compare the images with the floor."""
    from jobs.reports.collect import collect
    from jobs.reports.run_page import render_report

    content, metrics = collect(job)
    page, numbers = job.url("report/index.html"), job.url("metrics.json")
    # The page comes first and is written even if the floor is missed: it shows what went wrong.
    replace_object(page, render_report(content).encode())
    replace_object(numbers, (json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    for sentence in content.other_weights:
        logger.warning(f"  {sentence}")
    logger.info(f"  open {page}")
    logger.info(f"  and  {numbers}")
    floor, oracle = job.recipe.oracle_floor, metrics["oracle"]
    if floor is not None and oracle and oracle["mean_attributes_right"] < floor:
        raise BelowFloor(
            f"the oracle finds {oracle['mean_attributes_right']:.0%} of the captions' attributes in "
            f"{oracle['images']} images of the teacher, below the recipe's oracle_floor of {floor:.0%}: the "
            "model or its sampling is broken"
        )


def preview(job: Job) -> list[str]:
    """Describe the output."""
    return [f"would write {job.url('report/index.html')} and {job.url('metrics.json')}"]


main = recipe_verb("report", report, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
