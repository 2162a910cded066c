"""Run all steps in order: LATENTS, efficient UNet, student, PAIRS, decoder, evaluation, bundle, report.

Committed output is not computed again, so a stopped run continues where it was.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from jobs import (
    compile_mobile,
    compute_targets,
    distill_decoder,
    distill_schedule,
    distill_steps,
    encode_latents,
    evaluate,
    find_duplicates,
    finetune_vpred,
    generate_pairs,
    measure_latency,
    report,
    train_efficient,
)
from jobs.cli import scenes
from jobs.cli.job import Job
from jobs.cli.step_times import record_step
from jobs.cli.usage import usage_lines
from jobs.cli.verb import Body, Preview, recipe_verb
from jobs.recipes.dataflow import missing_inputs, missing_values
from jobs.recipes.unread import unread_by_pipeline
from jobs.recipes.verbs import pipeline_verbs
from jobs.runtime.logs import logger
from jobs.runtime.progress import format_duration, show_status
from pipelines.storage.objects import exists
from snapfusion.export.installed import check_compilers
from snapfusion.export.layout import MANIFEST
from snapfusion.settings import SettingsError

STEPS: dict[str, tuple[Body, Preview]] = {
    "render_scenes": (scenes.render_scenes, scenes.preview),
    "find_duplicates": (find_duplicates.find, find_duplicates.preview),
    "encode_latents": (encode_latents.encode, encode_latents.preview_given),
    "finetune_vpred": (finetune_vpred.finetune, finetune_vpred.preview),
    "measure_latency": (measure_latency.measure, measure_latency.preview),
    "train_efficient": (train_efficient.train_efficient, train_efficient.preview),
    "compute_targets": (compute_targets.compute, compute_targets.preview),
    "distill_steps": (distill_steps.distill, distill_steps.preview),
    "distill_schedule": (distill_schedule.distill_schedule, distill_schedule.preview),
    "generate_pairs": (generate_pairs.generate, generate_pairs.preview),
    "distill_decoder": (distill_decoder.distill, distill_decoder.preview),
    "evaluate": (evaluate.compare, evaluate.preview),
    "compile_mobile": (compile_mobile.compile_mobile, compile_mobile.preview),
}


def run_pipeline(job: Job) -> None:
    """Carry out the steps that are not committed, then write the report.

    Raises:
        SettingsError: if a step's input is not given, or made by no earlier step.
    """
    from jobs.reports.run_state import input_state, is_done, mark_done

    began = time.monotonic()
    verbs = pipeline_verbs(job.recipe)
    if missing := _missing(job, verbs):
        others = f" (and {len(missing) - 1} more: add --dry-run to see all)" if missing[1:] else ""
        raise SettingsError(f"{missing[0]}{others}")
    if is_done(job):
        logger.info(f"[1-{len(verbs)}/{len(verbs) + 1}] nothing is left to do: {', '.join(verbs)}")
    else:
        if "compile_mobile" in verbs and not exists(job.url(f"mobile/{MANIFEST}")):
            check_compilers(job.recipe.mobile)
        inputs = input_state(job)
        for number, verb in enumerate(verbs, start=1):
            logger.info(f"[{number}/{len(verbs) + 1}] {verb}")
            show_status(verb)
            body, _ = STEPS[verb]
            with record_step(job, verb):
                body(replace(job, verb=verb))
        mark_done(job, inputs)
    logger.info(f"[{len(verbs) + 1}/{len(verbs) + 1}] report")
    report.report(replace(job, verb="report"))
    logger.info(f"done in {format_duration(time.monotonic() - began)}")
    for line in usage_lines(job):
        logger.info(line)


def _missing(job: Job, verbs: Sequence[str]) -> list[str]:
    """What the steps lack, a line each; targets that none of them could use are refused at once."""
    if {"compute_targets", "distill_steps"} <= {*verbs} and job.recipe.distill.table is None:
        compute_targets.check_use(job.recipe)
    made = missing_inputs(job.recipe, verbs, exists=lambda name: exists(job.url(name)))
    return [*missing_values(compile_mobile.licensed_recipe(job), verbs), *made]


def preview(job: Job) -> list[str]:
    """Preview of each step, and what has to be given before they can run."""
    verbs = pipeline_verbs(job.recipe)
    lines = [f"{verb:<16} {line}" for verb in verbs for line in STEPS[verb][1](job) if line]
    return [*lines, *(f"missing          {line}" for line in _missing(job, verbs))]


main = recipe_verb("run_pipeline", run_pipeline, preview=preview, about=__doc__, unread=unread_by_pipeline)

if __name__ == "__main__":
    main.exit()
