"""Says how a run's models are used: the page to open, and the commands that generate images with them."""

from jobs.cli.job import Job
from jobs.training.sources import RUN_PREFIX
from pipelines.storage.objects import exists
from snapfusion.export.web_page import PAGE_FOLDER
from snapfusion.mini.captions import caption_grammar
from snapfusion.models.bundled import BUNDLED


def usage_lines(job: Job) -> list[str]:
    """Lines that name the report, and commands that generate images with the run's student and bundle."""
    student = (job.recipe.mobile.model or "").removeprefix(RUN_PREFIX).removesuffix("/model")
    caption, bundle = job.recipe.mobile.captions[0], job.url("mobile")
    lines = [
        f"open {job.url('report/index.html')}, or generate images yourself:",
        f'  snapfusion generate "{caption}" --model {job.url(student)}',
        f'  snapfusion generate "{caption}" --bundle {bundle}',
    ]
    if exists(f"{bundle}/{PAGE_FOLDER}/index.html"):
        lines.append(f"  snapfusion serve --bundle {bundle}    # in a browser, after make web")
    return [*lines, *([caption_grammar()] if job.recipe.model in BUNDLED else [])]
