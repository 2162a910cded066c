"""Fine-tune a model that predicts eps into one that predicts v, from its own weights. SnapFusion Eq. 6."""

from jobs.cli.in_run import FOLLOW, describe_training, train_in_run
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.recipes.registry import recipe_named
from jobs.runtime.logs import logger
from snapfusion.models.local_folder import stated_prediction_type
from snapfusion.prediction_types import PredictionType


def finetune(job: Job) -> None:
    """Make the run's v model, unless it is published already or the recipe's model predicts v."""
    from snapfusion.models.load import load_prediction_type

    if load_prediction_type(job.recipe.model) == "v_prediction":
        logger.info(f"  {job.recipe.model} predicts v already")
        return
    train_in_run(job, "vpred", model=job.recipe.model, url=job.url("vpred"))


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    model, kind = job.recipe.model, _known_prediction_type(job)
    if kind == "v_prediction":
        return [f"nothing to fine-tune: {model} predicts v already"]
    training = describe_training(
        job.url("latents"),
        job.recipe.vpred.loop,
        url=job.url("vpred"),
        follow=bool(job.options.get("follow")),
    )
    condition = "" if kind else "; nothing if it predicts v already"
    return [f"would fine-tune {model} to predict v {training}{condition}"]


def _known_prediction_type(job: Job) -> PredictionType | None:
    """The prediction type of the recipe's model; None where it would have to be fetched."""
    model = job.recipe.model
    if kind := stated_prediction_type(model):
        return kind
    if model == recipe_named(job.recipe.name).model:
        return None
    # The settings that follow from another model than the recipe's are known by now, so it was opened.
    from snapfusion.models.load import load_prediction_type

    return load_prediction_type(model)


main = recipe_verb("finetune_vpred", finetune, preview=preview, about=__doc__, options=[FOLLOW])

if __name__ == "__main__":
    main.exit()
