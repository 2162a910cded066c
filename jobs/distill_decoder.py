"""Distil the half-width decoder from the teacher's, on PAIRS. SnapFusion Sec. 3.2 and B.2.

OUT/decoder/config.json, decoder.safetensors   the decoder, for `snapfusion.models.decoder.load_decoder`
OUT/decoder/metrics.json                       parents, settings, training curve and evaluation
"""

from jobs.cli.in_run import connect_unless_published, describe_training
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger


def distill(job: Job) -> None:
    """Make the run's decoder, unless it is published already."""
    from jobs.training.decoder import distill_decoder, summary

    url = job.url("decoder")
    connect_unless_published(job, "decoder", url)
    metrics = distill_decoder(
        job.recipe.decoder,
        pairs_url=job.url("pairs"),
        out_url=url,
        teacher=job.recipe.model,
    )
    for line in summary(metrics):
        logger.info(f"  {line}")


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    training = describe_training(job.url("pairs"), job.recipe.decoder.loop, url=job.url("decoder"))
    return [f"would train a half-width decoder {training}"]


main = recipe_verb("distill_decoder", distill, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
