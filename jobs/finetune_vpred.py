"""Fine-tune a model that predicts eps into one that predicts v, from its own weights. SnapFusion Eq. 6."""

from jobs.cli.in_run import describe_training, train_in_run
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger


def finetune(job: Job) -> None:
    """Make the run's v model, unless it is published already or the recipe's model predicts v."""
    from snapfusion.models.load import load_prediction_type

    if load_prediction_type(job.recipe.model) == "v_prediction":
        logger.info(f"  {job.recipe.model} predicts v already")
        return
    train_in_run(job, "vpred", model=job.recipe.model, url=job.url("vpred"))


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    training = describe_training(job.url("latents"), job.recipe.vpred.loop, url=job.url("vpred"))
    return [f"would fine-tune {job.recipe.model} to predict v {training}; nothing if it predicts v already"]


main = recipe_verb("finetune_vpred", finetune, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
