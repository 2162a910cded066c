"""Train the ablations' students and draw their panels. SnapFusion Fig. 6 and 7.

In the run's folder:

students/NAME-seedN/             each student, as `jobs.distill_steps` leaves it
evaluation/                      what each line drew, as `jobs.evaluate` leaves it
ablation/NAME.json               a panel's figures, with the settings and the commit of its command
ablation/NAME-fid.svg, ...       its charts
ablation/page.html               all panels there are, to look at

A student or a picture that is committed is not made again, so this can be stopped anywhere and go on later;
`--set 'ablation.only=["6c"]'` makes one panel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs import encode_latents
from jobs.cli.job import Job, run
from jobs.cli.scenes import render_scenes
from jobs.evaluation.evaluation import evaluate
from jobs.evaluation.settings import Contender, EvaluationSettings, FidGap
from jobs.recipes.ablation import AblationSettings, Line, Panel, StudentVariant, contender_name, table_name
from jobs.reports.ablation_page import ablation_charts, render_ablation, sample_image_rows
from jobs.reports.charts import standalone_svg
from jobs.runtime.cluster import connect, runner
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import show_progress
from jobs.training.distillation import distill_steps, summary
from jobs.training.progress_channel import show_reports
from jobs.training.run_folder import METRICS
from jobs.training.settings import VpredSettings
from jobs.training.velocity import finetune_vpred
from pipelines.storage.objects import exists, read_bytes, replace_object
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress
from snapfusion.metrics.intervals import Interval


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.ablate`."""
    return run("ablate", ablate, preview=preview, about=__doc__, argv=argv)


def ablate(job: Job) -> None:
    """Make what is not made yet, panel by panel."""
    settings = job.recipe.ablation
    if not settings.chosen:
        raise ValueError(f"--recipe {job.recipe.name}: it has no ablation; the recipe ablation has")
    if job.recipe.source.url is None:
        render_scenes(job)
    encode_latents.encode(job)
    connect(job.recipe.cluster)
    for panel in settings.chosen:
        print(f"[{panel.name}] {panel.title}", flush=True)
        for variant, seed in students_of(settings, panel):
            train(job, variant, seed=seed)
        write_panel(job, panel)
        write_page(job)
    print(f"  {job.url('ablation/page.html')}")


def students_of(settings: AblationSettings, panel: Panel) -> list[tuple[StudentVariant, int]]:
    """The students of a panel's lines, each after those it learns from, seed by seed."""
    names = [line.variant for line in panel.lines if line.variant is not None]
    wanted = {
        (variant.name, seed): (variant, seed)
        for seed in settings.seeds_of(panel)
        for name in names
        for variant in settings.lineage(name)
    }
    return list(wanted.values())


def train(job: Job, variant: StudentVariant, *, seed: int) -> None:
    """One student, unless it is there."""
    settings, url = job.recipe.ablation, student_url(job, variant.name, seed=seed)
    if exists(f"{url}/{METRICS}"):
        return
    print(f"[{variant.name}, seed {seed}]", flush=True)
    distill = job.recipe.distill
    loop = distill.loop.model_copy(update={"seed": seed})
    first = settings.model
    if variant.after is not None:
        first = f"{student_url(job, variant.after, seed=seed)}/model"
    shared: dict[str, Any] = {"out_url": url, "on_report": show_reports()}
    if variant.steps is None:
        control = VpredSettings(
            loop=loop,
            loader=distill.loader,
            evaluation_rows=distill.evaluation_rows,
            trainer=distill.trainer,
        )
        finetune_vpred(control, model=first, latents_url=job.url("latents"), further=True, **shared)
        return
    told = distill.model_copy(update={"name": variant.name, "loop": loop, "steps": variant.steps})
    metrics = distill_steps(told, teacher=first, data_url=job.url("latents"), **shared)
    for line in summary(metrics):
        print(f"  {line}")


def student_url(job: Job, name: str, *, seed: int) -> str:
    """The folder of a student."""
    return job.url(f"students/{name}-seed{seed}")


def write_panel(job: Job, panel: Panel) -> None:
    """Draw the lines of a panel, and write its figures and charts."""

    def start(name: str, parents: Any) -> tuple[Origin, OnProgress]:  # noqa: ANN401 - JSON values
        return job.origin(parents), show_progress(name)

    results = evaluate(
        evaluation_of(job, panel),
        model=job.recipe.ablation.model,
        out=job.url("evaluation"),
        start=start,
        run=runner(job.recipe.cluster),
    )
    seeds = job.recipe.ablation.seeds_of(panel)
    told = {
        "panel": panel.to_values(),
        "seeds": list(seeds),
        "command": f"python -m jobs.ablate --recipe {job.recipe.name}",
        "settings": job.recipe.digest(),
        "training": job.recipe.distill.loop.to_values(),
        "over_seeds": list(over_seeds_of(panel, seeds=seeds, results=results)),
        "evaluation": results,
    }
    # Six digits say all that 500 captions can.
    text = json.dumps(json.loads(json.dumps(told), parse_float=lambda digits: float(f"{float(digits):.6g}")))
    text = job.with_run_prefix(text)
    replace_object(panel_url(job, panel.name), text.encode())
    for kind, chart in ablation_charts(json.loads(text)).items():
        replace_object(job.url(f"ablation/{panel.name}-{kind}.svg"), standalone_svg(chart))


def panel_url(job: Job, name: str) -> str:
    """The file of a panel's figures."""
    return job.url(f"ablation/{name}.json")


def evaluation_of(job: Job, panel: Panel) -> EvaluationSettings:
    """Who is compared in a panel: each line of each seed."""
    contenders = [
        Contender(
            name=contender_name(line, seed),
            model=_model_of(job, line, seed=seed),
            sampler=line.sampler,
            table=table_name(line, seed),
        )
        for line, seed in _lines(job.recipe.ablation, panel)
    ]
    gaps = [
        FidGap(student=contender_name(line, seed), few=panel.baseline, many=panel.many, w=w)
        for line, seed in _lines(job.recipe.ablation, panel)
        if line.variant is not None
        for w in panel.gap_at
    ]
    controls = [
        contender_name(line, seed)
        for line, seed in _lines(job.recipe.ablation, panel)
        if line.name == panel.control
    ]
    values = {
        "contenders": tuple(contenders),
        "baseline": panel.baseline,
        "also_against": (panel.many, *controls),
        "gaps": tuple(gaps),
    }
    return job.recipe.evaluation.model_copy(update=values)


def over_seeds_of(panel: Panel, *, seeds: range, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The mean over training seeds of each figure of each line, with the least and the largest."""
    for line in panel.lines:
        names = [contender_name(line, seed) for seed in (seeds if line.variant is not None else seeds[:1])]
        curves = [results["curves"][name]["points"] for name in names]
        points = []
        for at_one_w in zip(*curves, strict=True):
            figures = [name for name, value in at_one_w[0].items() if isinstance(value, Interval)]
            told = {name: _over_seeds([point[name][0] for point in at_one_w]) for name in figures}
            points.append({"w": at_one_w[0]["w"], "evaluations": at_one_w[0]["evaluations"], **told})
        yield {
            "name": line.name,
            "student": line.variant is not None,
            "contenders": names,
            "points": points,
        }


def _over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def write_page(job: Job) -> None:
    """The page of all panels there are."""
    settings = job.recipe.ablation
    places = {panel.name: panel_url(job, panel.name) for panel in settings.panels}
    panels = [json.loads(read_bytes(place)) for place in places.values() if exists(place)]
    shown = [line.variant for line in settings.panels[0].lines if line.variant is not None]
    curves = {
        name: json.loads(read_bytes(place))["curve"]
        for name in shown
        if exists(place := f"{student_url(job, name, seed=0)}/{METRICS}")
    }
    rows = sample_image_rows(_image_lines(job), w=settings.pictures_at)
    page = render_ablation(panels, curves=curves, rows=rows, w=settings.pictures_at)
    replace_object(job.url("ablation/page.html"), page.encode())


def _image_lines(job: Job) -> dict[str, tuple[str, int]]:
    """(source, steps) of the lines whose pictures are shown: those of the first panel, of the first seed."""
    settings = job.recipe.ablation
    return {
        line.name: (_model_of(job, line, seed=0) or settings.model, line.steps)
        for line in settings.panels[0].lines
        if line.variant is None or exists(f"{student_url(job, line.variant, seed=0)}/{METRICS}")
    }


def _lines(settings: AblationSettings, panel: Panel) -> Iterator[tuple[Line, int]]:
    for line in panel.lines:
        for seed in settings.seeds_of(panel) if line.variant is not None else range(1):
            yield line, seed


def _model_of(job: Job, line: Line, *, seed: int) -> str | None:
    return None if line.variant is None else f"{student_url(job, line.variant, seed=seed)}/model"


def preview(job: Job) -> list[str]:
    """What would be trained and drawn, and how much of it is there."""
    settings = job.recipe.ablation
    lines = []
    for panel in settings.chosen:
        students = students_of(settings, panel)
        there = sum(exists(f"{student_url(job, v.name, seed=seed)}/{METRICS}") for v, seed in students)
        drawn = len(list(_lines(settings, panel)))
        lines.append(
            f"{panel.name}: would train {len(students)} students ({there} are there) and draw {drawn} lines "
            f"at {len(job.recipe.evaluation.guidance)} guidance scales"
        )
    return lines or ["nothing: this recipe has no ablation"]


if __name__ == "__main__":
    exit_process(main())
