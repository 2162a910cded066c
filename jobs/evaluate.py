"""Compare models and samplers by FID and CLIP over guidance scales. SnapFusion Sec. 5, Table 2, Fig. 4.

In the run's folder, under evaluation/:

references/, one table for each contender     what was drawn and judged; made once, added to later
results.json                                  the figures, with all they must be quoted with
page.html, chart-1.svg, ...                   the same, to look at
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jobs.cli.job import Job, run
from jobs.evaluation.evaluation import evaluate
from jobs.evaluation.settings import EvaluationSettings
from jobs.reports.charts import standalone_svg
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from jobs.runtime.cluster import runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from pipelines.storage.objects import replace_object
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.evaluate`."""
    return run("evaluate", compare, preview=preview, about=__doc__, argv=argv)


def compare(job: Job) -> None:
    """Draw what is not drawn yet, and write the figures."""

    def start(name: str, parents: Any) -> tuple[Origin, OnProgress]:  # noqa: ANN401 - JSON values
        return job.origin(parents), show_progress(f"{job.verb} {name}")

    results = evaluate(
        _resolve_contenders(job),
        model=job.recipe.model,
        out=job.url("evaluation"),
        start=start,
        run=runner(job.recipe.cluster),
    )
    results["settings"] = job.recipe.digest()
    text = job.with_run_prefix(json.dumps(results, indent=1))
    replace_object(job.url("evaluation/results.json"), text.encode())
    told = json.loads(text)
    for number, chart in enumerate(evaluation_charts(told), start=1):
        replace_object(job.url(f"evaluation/chart-{number}.svg"), standalone_svg(chart))
    replace_object(job.url("evaluation/page.html"), render_evaluation(told).encode())
    for note in told["protocol"]["notes"]:
        print(f"  {note}")
    for name, reading in told["equal_fid"].items():
        print(f"  {name}: {_describe_reading(reading, against=told['baseline'])}")
    print(f"  {job.url('evaluation/results.json')}, shown in {job.url('evaluation/page.html')}")


def _resolve_contenders(job: Job) -> EvaluationSettings:
    """The evaluation with each contender where it lies."""
    wanted = job.recipe.evaluation
    contenders = tuple(
        contender.model_copy(
            update={
                "model": contender.model and job.resolve(contender.model),
                "decoder": contender.decoder and job.resolve(contender.decoder),
            }
        )
        for contender in wanted.contenders
    )
    return wanted.model_copy(update={"contenders": contenders})


def _describe_reading(reading: dict[str, Any], *, against: str) -> str:
    if "no_reading" in reading:
        return f"not read against {against}: {reading['no_reading']}"
    value, low, high = reading["clip"]
    return (
        f"CLIP {value:+.4f} ({low:+.4f} to {high:+.4f}) against {against} at equal FID, "
        f"{reading['fid_low']:.4g} to {reading['fid_high']:.4g}"
    )


def preview(job: Job) -> list[str]:
    """How much would be drawn, at most."""
    wanted = job.recipe.evaluation
    drawn = wanted.prompts.limit * len(wanted.guidance)
    evaluations = wanted.prompts.limit * sum(
        contender.sampler.evaluations(w) for contender in wanted.contenders for w in wanted.guidance
    )
    return [
        f"would draw at most {drawn:,} pictures of each of {len(wanted.contenders)} contenders, "
        f"{evaluations:,} UNet evaluations of one row, into {job.url('evaluation')}"
    ]


if __name__ == "__main__":
    exit_process(main())
