"""Which licence holds for what is made from a model: a recipe states that of its own model."""

from collections.abc import Iterator

from jobs.cli.job import Job
from jobs.cli.state import read_json
from jobs.training.metrics import METRICS
from pipelines.storage.objects import absolute_url
from snapfusion.export.settings import Licence
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.source import absolute_source


def licence_of(job: Job, *sources: str) -> Licence:
    """The licence of what a job makes from models, without the terms that are not stated.

    The terms in a recipe are those of its own model, and hold for what the run has made of it. For another
    model, and for what was made of that, only those hold that were assigned, by --config or --set.

    Args:
        job: whose recipe it is.
        sources: of the models, as `Job.resolve` returns them.
    """
    licence = job.recipe.mobile.licence
    if all(_is_of_recipe(origin, job) for source in sources for origin in _origins(source, job)):
        return licence
    values = licence.to_values().items()
    return Licence(**{name: value for name, value in values if job.assigns(f"mobile.licence.{name}")})


def _origins(source: str, job: Job) -> Iterator[str]:
    """The model itself or, if the run has trained it, those that it was made from."""
    parents = _parents(source) if _is_in_run(source, job) else []
    if not parents:
        yield source
    for parent in parents:
        yield from _origins(parent, job)


def _parents(source: str) -> list[str]:
    """The models of a training's record, which lies in a decoder's folder, and beside a model's."""
    for folder in (source, source.rpartition("/")[0]):
        # A model right below the run has the report's record beside it, which has no parents.
        if (record := read_json(f"{folder}/{METRICS}")) is not None and "parents" in record:
            return [parent["source"] for parent in record["parents"].values() if "source" in parent]
    return []


def _is_of_recipe(source: str, job: Job) -> bool:
    """Whether a model is the recipe's own, or one in the run."""
    model = job.recipe.model
    if source == model or (source in BUNDLED and model in BUNDLED):
        return True
    return _is_in_run(source, job) or absolute_source(source) == absolute_source(model)


def _is_in_run(source: str, job: Job) -> bool:
    out = f"{absolute_url(job.out)}/"
    return source.startswith(f"{job.out}/") or absolute_source(source).startswith(out)
