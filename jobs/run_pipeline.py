"""The whole run, in order: shards, LATENTS, efficient UNet, student, PAIRS, decoder, mobile program, report.

What is committed already is not made again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jobs import (
    compile_mobile,
    distill_decoder,
    distill_steps,
    encode_latents,
    find_duplicates,
    generate_pairs,
    measure_latency,
    report,
    train_efficient,
)
from jobs.cli import scenes
from jobs.cli.job import Body, Job, Preview, run
from jobs.cli.step_times import record_step
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import format_duration
from jobs.training.sources import EFFICIENT_MODEL

PipelineStep = tuple[str, Body, Preview]

STEPS: tuple[PipelineStep, ...] = (
    ("render_scenes", scenes.render_scenes, scenes.preview),
    ("find_duplicates", find_duplicates.find, find_duplicates.preview),
    ("encode_latents", encode_latents.encode, encode_latents.preview),
    ("measure_latency", measure_latency.measure, measure_latency.preview),
    ("train_efficient", train_efficient.train_efficient, train_efficient.preview),
    ("distill_steps", distill_steps.distill, distill_steps.preview),
    ("generate_pairs", generate_pairs.generate, generate_pairs.preview),
    ("distill_decoder", distill_decoder.distill, distill_decoder.preview),
    ("compile_mobile", compile_mobile.compile_mobile, compile_mobile.preview),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.run_pipeline`."""
    return run("run_pipeline", run_pipeline, preview=preview, about=__doc__, argv=argv)


def run_pipeline(job: Job) -> None:
    """Carry out the steps that are not committed, then write the report."""
    began = time.monotonic()
    steps = steps_of(job)
    for number, (verb, body, _) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps) + 1}] {verb}", flush=True)
        with record_step(job, verb):
            body(replace(job, verb=verb))
    print(f"[{len(steps) + 1}/{len(steps) + 1}] report", flush=True)
    report.report(replace(job, verb="report"))
    print(f"done in {format_duration(time.monotonic() - began)}")


def steps_of(job: Job) -> list[PipelineStep]:
    """The steps of this recipe: scenes only where no shards are named, a student only if its teacher is.

    Copies are looked for only if they are to be refused.

    The efficient UNet is made, and timed, only for a student that begins with it.
    """
    left_out, distill = set(), job.recipe.distill
    if not job.recipe.deduplication.use:
        left_out.add("find_duplicates")
    if job.recipe.source.url is not None:
        left_out.add("render_scenes")
    if distill.teacher is None:
        left_out.add("distill_steps")
    if distill.teacher is None or distill.student != EFFICIENT_MODEL:
        left_out |= {"measure_latency", "train_efficient"}
    return [step for step in STEPS if step[0] not in left_out]


def preview(job: Job) -> list[str]:
    """What each step would do."""
    return [f"{verb}: {line}" for verb, _, step in steps_of(job) for line in step(job)]


if __name__ == "__main__":
    exit_process(main())
