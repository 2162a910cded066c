"""Compare models and samplers by FID and CLIP over guidance scales. SnapFusion Sec. 5, Table 2, Fig. 4.

OUT/evaluation/references/, a table for each contender   features and samples, to which more are appended
OUT/evaluation/results.json                              metrics and protocol
OUT/evaluation/page.html, chart-1.svg, ...               the same as a page
"""

import json
from typing import Any

from jobs.cli.caption_list import preview_list
from jobs.cli.in_run import table_starter
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.cli.step_times import record_step
from jobs.cli.verb import recipe_verb
from jobs.evaluation.settings import EvaluationSettings
from jobs.evaluation.weight_files import missing_weights
from jobs.recipes.recipe import EXAMPLE_BUCKET
from jobs.runtime.logs import logger
from pipelines.storage.objects import replace_object


def compare(job: Job) -> None:
    """Generate the missing samples, and write metrics, charts and page."""
    from jobs.evaluation.evaluation import evaluate
    from jobs.reports.charts import standalone_svg
    from jobs.reports.evaluation_page import evaluation_charts, render_evaluation

    results = evaluate(
        _resolve_contenders(job),
        model=job.recipe.model,
        out=job.url("evaluation"),
        start=table_starter(job, prefix=f"{job.verb} "),
        run=runner(job, "evaluation"),
    )
    text = job.with_run_prefix(json.dumps({**results, "settings": job.recipe.digest()}, indent=1))
    replace_object(job.url("evaluation/results.json"), text.encode())
    results = json.loads(text)
    for number, chart in enumerate(evaluation_charts(results), start=1):
        replace_object(job.url(f"evaluation/chart-{number}.svg"), standalone_svg(chart))
    replace_object(job.url("evaluation/page.html"), render_evaluation(results).encode())
    for note in results["protocol"]["notes"]:
        logger.info(f"  {note}")
    for name, reading in results["equal_fid"].items():
        logger.info(f"  {name}: {_describe_reading(reading, against=results['baseline'])}")
    for one in results["criteria"]:
        logger.info(f"  criterion {'met' if one['met'] else 'missed'}: {_describe_criterion(one)}")
    logger.info(f"  {job.url('evaluation/results.json')}, shown in {job.url('evaluation/page.html')}")


def compare_alone(job: Job) -> None:
    """`compare`, with its time and memory kept as those of a pipeline's step are."""
    with record_step(job, job.verb):
        compare(job)


def _resolve_contenders(job: Job) -> EvaluationSettings:
    """The settings with contenders of this run by their URLs."""
    settings = job.recipe.evaluation
    contenders = tuple(
        contender.model_copy(
            update={
                "model": contender.model and job.resolve(contender.model),
                "decoder": contender.decoder and job.resolve(contender.decoder),
            }
        )
        for contender in settings.contenders
    )
    return settings.model_copy(update={"contenders": contenders})


def _describe_reading(reading: dict[str, Any], *, against: str) -> str:
    if "no_reading" in reading:
        return f"not compared with {against}: {reading['no_reading']}"
    value, low, high = reading["clip"]
    return (
        f"CLIP {value:+.4f} ({low:+.4f} to {high:+.4f}) against {against} at equal FID, "
        f"{reading['fid_low']:.4g} to {reading['fid_high']:.4g}"
    )


def _describe_criterion(one: dict[str, Any]) -> str:
    bound = f"at least {one['at_least']:g}" if one["at_least"] is not None else f"at most {one['at_most']:g}"
    compared = f"{one['metric'].upper()} of {one['contender']} minus {one['against']} at w = {one['w']:g}"
    return f"{compared}: {one['difference'][0]:+.4g}, {bound} is required"


def preview(job: Job) -> list[str]:
    """Describe how much would be sampled, at most."""
    settings = job.recipe.evaluation
    num_images = settings.num_images * settings.num_points
    evaluations = settings.num_images * settings.num_evaluations
    prompts, rows = settings.prompts, job.recipe.source.sample_rows
    return [
        *preview_list(prompts.url, prompts.reading, rows=min(rows, prompts.limit)),
        f"would generate at most {num_images:,} images by {len(settings.contenders)} contenders, "
        f"{evaluations:,} UNet evaluations of one row, into {job.url('evaluation')}",
    ]


def preview_with_weights(job: Job) -> list[str]:
    """The preview, and which files of weights are missing."""
    missing = missing_weights(job.recipe.evaluation, examples=EXAMPLE_BUCKET)
    return [*preview(job), *(f"missing: {line}" for line in missing)]


main = recipe_verb("evaluate", compare_alone, preview=preview_with_weights, about=__doc__)

if __name__ == "__main__":
    main.exit()
