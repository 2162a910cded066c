"""Train a v model with stochastic block skipping, so that it tolerates removed blocks. SnapFusion Eq. 5.

OUT/robust/   the model, in the layout of `jobs.training.student`
"""

from jobs.cli.in_run import FOLLOW, describe_training, train_in_run
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb


def train_robust(job: Job) -> None:
    """Make the run's robust model, unless it is published already."""
    settings = job.recipe.robust
    model = job.resolve(settings.begin)
    train_in_run(job, "robust.training", model=model, url=job.url("robust"), further=True)


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    settings, skip = job.recipe.robust, job.recipe.robust.training.skip
    training = describe_training(
        job.url("latents"),
        settings.training.loop,
        url=job.url("robust"),
        follow=bool(job.options.get("follow")),
    )
    return [
        f"would train {job.resolve(settings.begin)} {training}, skipping each cross-attention block with "
        f"probability {skip.attention:g} and each ResNet block with {skip.resnet:g}"
    ]


main = recipe_verb("train_robust", train_robust, preview=preview, about=__doc__, options=[FOLLOW])

if __name__ == "__main__":
    main.exit()
