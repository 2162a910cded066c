"""Says how a run's models are used: the page to open, and the commands that generate images with them."""

from jobs.cli.job import Job
from jobs.training.sources import RUN_PREFIX
from pipelines.storage.objects import exists
from snapfusion.export.web_page import PAGE_FOLDER
from snapfusion.mini.captions import caption_grammar
from snapfusion.models.bundled import BUNDLED


def usage_lines(job: Job) -> list[str]:
    """Lines that name the report, and commands that generate images with the run's student and bundle."""
    return [
        f"open {job.url('report/index.html')}, or generate images yourself:",
        *(f"  {command}" for command in usage_commands(job)),
        *([caption_grammar()] if job.recipe.model in BUNDLED else []),
    ]


def usage_commands(job: Job) -> list[str]:
    """Commands that generate images with the run's student and bundle: files, or in a browser."""
    student = (job.recipe.mobile.model or "").removeprefix(RUN_PREFIX).removesuffix("/model")
    caption, bundle = job.recipe.mobile.captions[0], job.url("mobile")
    commands = [
        f'snapfusion generate "{caption}" --model {job.url(student)}',
        f'snapfusion generate "{caption}" --bundle {bundle}',
        f"snapfusion serve {job.recipe.model} {job.url(student)} --bundle {bundle}    # side by side",
    ]
    if has_page(job):
        commands.append(f"snapfusion serve --bundle {bundle}    # in the browser itself, after make web")
    return commands


def has_page(job: Job) -> bool:
    """Whether the run's bundle has a page."""
    return exists(job.url(f"mobile/{PAGE_FOLDER}/index.html"))
