"""Give a v model another architecture, Table 3's or an evolved one, and train it. SnapFusion App. A.

OUT/efficient-first/   the model with its initial weights (`jobs.training.initial_weights`)
OUT/efficient/         the trained model, in the layout of `jobs.training.student`
"""

from jobs.cli.in_run import FOLLOW, describe_training, train_in_run
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger


def train_efficient(job: Job) -> None:
    """Make the run's efficient model, unless it is published already."""
    from jobs.training.initial_weights import named_architecture, own_architecture, with_architecture
    from snapfusion.models.cost import costs_of

    settings, url = job.recipe.efficient, job.url("efficient")
    begin = job.resolve(settings.begin)
    origin = own_architecture(begin)
    architecture = named_architecture(job.resolve(settings.architecture), own=origin)
    first = with_architecture(begin, architecture, url=job.url("efficient-first"))
    sizes = [costs_of(one).total.parameters for one in (origin, architecture)]
    logger.info(f"  {url}: {sizes[1]:,} parameters of {sizes[0]:,}")
    train_in_run(job, "efficient.training", model=first, url=url, begin=begin, further=True)


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    settings = job.recipe.efficient
    training = describe_training(
        job.url("latents"),
        settings.training.loop,
        url=job.url("efficient"),
        follow=bool(job.options.get("follow")),
    )
    return [
        f"would give {job.resolve(settings.begin)} the architecture {job.resolve(settings.architecture)} and "
        f"train it {training}"
    ]


main = recipe_verb("train_efficient", train_efficient, preview=preview, about=__doc__, options=[FOLLOW])

if __name__ == "__main__":
    main.exit()
