"""Compare the run's evolved architecture with others of its latency, made by chance. SnapFusion Alg. 1.

OUT/chance/chance.json                 the figures: all are trained alike, judged alike and timed in turns
OUT/chance/first/, trained/, a table each   what they are made from and of; what is there is not made again
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.cli.in_run import resolve_training
from jobs.cli.job import Job, run
from jobs.evolution.random_baseline import COMPARED_METRICS, RandomBaseline
from jobs.evolve_unet import latency_table
from jobs.runtime.cluster import connect, runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from jobs.training.initial_weights import named_architecture, own_architecture
from jobs.training.progress_channel import show_reports
from pipelines.storage.objects import replace_object
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.compare_chance`."""
    return run("compare_chance", compare_chance, preview=preview, about=__doc__, argv=argv)


def compare_chance(job: Job) -> None:
    """Make what is not made yet, and write the figures."""
    model = job.resolve(job.recipe.evolution.begin)
    settings = job.recipe.chance
    training = resolve_training(settings.training, job)
    comparison = RandomBaseline(
        settings=settings.model_copy(update={"training": training}),
        model=model,
        evolved=named_architecture(job.url("evolution/architecture.json"), of=own_architecture(model)),
        table=latency_table(job),
        latents_url=job.url("latents"),
        out=job.url("chance"),
    )

    def start(name: str, parents: Any) -> tuple[Origin, OnProgress]:  # noqa: ANN401 - JSON values
        return job.origin(parents), show_progress(name)

    connect(job.recipe.cluster)
    told = comparison.compare(start=start, run=runner(job.recipe.cluster), on_report=show_reports())
    place = job.url("chance/chance.json")
    replace_object(place, job.with_run_prefix(json.dumps(told, indent=1)).encode())
    for reading in told["readings"]:
        for figure in COMPARED_METRICS:
            if figure in reading:
                print(f"  w = {reading['w']:g}, {figure}: {describe_reading(reading[figure])}")
    print(f"  {place}")


def describe_reading(one: Mapping[str, float]) -> str:
    """A figure of the evolved architecture beside those of the others."""
    return (
        f"{one['evolved']:.4g} evolved; by chance {one['median']:.4g} the median and {one['best']:.4g} the "
        f"best, {one['worse']} worse"
    )


def preview(job: Job) -> list[str]:
    """What would be trained and drawn."""
    settings = job.recipe.chance
    loop, evaluation = settings.training.loop, settings.evaluation
    return [
        f"would train {settings.count} architectures by chance and that of {job.url('evolution')} for "
        f"{loop.num_steps} steps of {loop.global_batch} rows each, and draw {evaluation.prompts.limit} "
        f"captions at {len(evaluation.guidance)} guidance scales with each, into {job.url('chance')}"
    ]


if __name__ == "__main__":
    exit_process(main())
