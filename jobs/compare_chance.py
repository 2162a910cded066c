"""Compare the run's evolved architecture with random ones of its latency. SnapFusion Alg. 1.

OUT/chance/chance.json        metrics: all architectures are trained and scored alike, and timed in turns
OUT/chance/first/, trained/   initial and trained models, with a table of samples each
"""

import json

from jobs.cli.in_run import resolve_training, table_starter
from jobs.cli.job import Job
from jobs.cli.resources import connect_for, runner
from jobs.cli.verb import recipe_verb
from jobs.evolve_unet import latency_table
from jobs.runtime.logs import logger
from pipelines.storage.objects import replace_object


def compare_chance(job: Job) -> None:
    """Train and score the architectures, unless that is done, and write the metrics."""
    from jobs.evolution.random_baseline import COMPARED_METRICS, RandomBaseline
    from jobs.training.initial_weights import named_architecture, own_architecture

    model, settings = job.resolve(job.recipe.evolution.begin), job.recipe.random_baseline
    baseline = RandomBaseline(
        settings=settings.model_copy(update={"training": resolve_training(settings.training, job)}),
        model=model,
        evolved=named_architecture(job.url("evolution/architecture.json"), own=own_architecture(model)),
        table=latency_table(job),
        latents_url=job.url("latents"),
        out=job.url("chance"),
    )

    connect_for(job, "random_baseline")
    results = baseline.compare(start=table_starter(job), run=runner(job, "random_baseline"))
    url = job.url("chance/chance.json")
    replace_object(url, job.with_run_prefix(json.dumps(results, indent=1)).encode())
    for reading in results["readings"]:
        for metric in COMPARED_METRICS:
            if metric in reading:
                line = "{evolved:.4g} evolved; random {median:.4g} median, {best:.4g} best, {worse} worse"
                logger.info(f"  w = {reading['w']:g}, {metric}: {line.format_map(reading[metric])}")
    logger.info(f"  {url}")


def preview(job: Job) -> list[str]:
    """Describe what would be trained and sampled."""
    settings = job.recipe.random_baseline
    loop, evaluation = settings.training.loop, settings.evaluation
    return [
        f"would train {settings.count} random architectures and that of {job.url('evolution')} for "
        f"{loop.num_steps} steps of {loop.global_batch} rows each, and sample with each "
        f"{evaluation.prompts.num_images} images at each of {len(evaluation.guidance)} guidance scales, into "
        f"{job.url('chance')}"
    ]


main = recipe_verb("compare_chance", compare_chance, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
