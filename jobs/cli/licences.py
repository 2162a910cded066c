"""Which licence holds for what is made from a model: a recipe states that of its own model."""

from jobs.cli.job import Job
from pipelines.storage.objects import absolute_url
from snapfusion.export.settings import Licence
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.source import absolute_source


def licence_of(job: Job, *sources: str) -> Licence:
    """The licence of what a job makes from models, without the terms that are not stated.

    The terms in a recipe are those of its own model, and hold for what the run has made. For another model
    only those hold that were assigned, by --config or --set.

    Args:
        job: whose recipe it is.
        sources: of the models, as `Job.resolve` returns them.
    """
    licence = job.recipe.mobile.licence
    if all(_is_of_recipe(source, job) for source in sources):
        return licence
    values = licence.to_values().items()
    return Licence(**{name: value for name, value in values if job.assigns(f"mobile.licence.{name}")})


def _is_of_recipe(source: str, job: Job) -> bool:
    """Whether a model is the recipe's own, or one in the run."""
    model = job.recipe.model
    if source == model or (source in BUNDLED and model in BUNDLED):
        return True
    absolute = absolute_source(source)
    in_run = source.startswith(f"{job.out}/") or absolute.startswith(f"{absolute_url(job.out)}/")
    return in_run or absolute == absolute_source(model)
