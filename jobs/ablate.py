"""Train the students of the ablations and evaluate their panels. SnapFusion Fig. 6 and 7.

OUT/students/NAME-seedN/         each student, as `jobs.distill_steps` publishes it
OUT/evaluation/                  samples of each line, as `jobs.evaluate` writes them
OUT/ablation/NAME.json           metrics of a panel, with the settings of its command
OUT/ablation/NAME.md             its tables for documents
OUT/ablation/NAME-fid.svg, ...   its charts
OUT/ablation/page.html           all finished panels as a page

A published student or a committed sample is not made again, so the job can be stopped and resumed at will;
`--set 'ablation.only=["6c"]'` makes one panel.
"""

import json

from jobs import encode_latents
from jobs.cli.ablation import (
    evaluate_panel,
    initial_model,
    is_trained,
    lines_of,
    model_of,
    student_url,
    students_of,
    train_student,
)
from jobs.cli.job import Job
from jobs.cli.resources import connect_for
from jobs.cli.scenes import render_scenes
from jobs.cli.state import read_json
from jobs.cli.verb import recipe_verb
from jobs.recipes.ablation import Panel
from jobs.runtime.logs import logger
from jobs.training.metrics import METRICS
from pipelines.storage.objects import replace_object


def ablate(job: Job) -> None:
    """Make what is missing, panel by panel."""
    settings = job.recipe.ablation
    if not settings.chosen:
        raise ValueError(f"--recipe {job.recipe.name}: it has no ablation; the recipe ablation has")
    if job.recipe.source.url is None:
        render_scenes(job)
    encode_latents.encode(job)
    connect_for(job, "distill")
    for panel in settings.chosen:
        logger.info(f"[{panel.name}] {panel.title}")
        for variant, seed in students_of(settings, panel):
            train_student(job, variant, seed=seed)
        write_panel(job, panel)
        write_page(job)
    logger.info(f"  {job.url('ablation/page.html')}")


def write_panel(job: Job, panel: Panel) -> None:
    """Evaluate a panel, and write its record, tables and charts."""
    from jobs.reports.ablation_page import ablation_charts
    from jobs.reports.ablation_tables import panel_tables
    from jobs.reports.charts import standalone_svg

    text = json.dumps(evaluate_panel(job, panel))
    # 500 captions determine no more than six digits.
    text = json.dumps(json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}")))
    text = job.with_run_prefix(text)
    replace_object(_panel_url(job, panel), text.encode())
    replace_object(job.url(f"ablation/{panel.name}.md"), panel_tables(json.loads(text)).encode())
    for kind, chart in ablation_charts(json.loads(text)).items():
        replace_object(job.url(f"ablation/{panel.name}-{kind}.svg"), standalone_svg(chart))


def _panel_url(job: Job, panel: Panel) -> str:
    return job.url(f"ablation/{panel.name}.json")


def write_page(job: Job) -> None:
    """Write the page of all finished panels, with curves and images of the first one."""
    from jobs.reports.ablation_page import render_ablation, sample_image_rows

    settings = job.recipe.ablation
    panels = [read_json(_panel_url(job, panel)) for panel in settings.panels]
    lines = settings.panels[0].lines
    trained = [name for line in lines if (name := line.variant) and is_trained(job, name, seed=0)]
    images = {
        line.name: (model_of(job, line, seed=0) or initial_model(job), line.steps)
        for line in lines
        if line.variant is None or line.variant in trained
    }
    page = render_ablation(
        [panel for panel in panels if panel is not None],
        curves={name: read_json(f"{student_url(job, name, seed=0)}/{METRICS}")["curve"] for name in trained},
        rows=sample_image_rows(images, w=settings.images_at),
        w=settings.images_at,
    )
    replace_object(job.url("ablation/page.html"), page.encode())


def preview(job: Job) -> list[str]:
    """Describe what would be trained and sampled, and how much of it exists."""
    settings = job.recipe.ablation
    lines = []
    for panel in settings.chosen:
        students = students_of(settings, panel)
        num_trained = sum(is_trained(job, variant.name, seed=seed) for variant, seed in students)
        lines.append(
            f"{panel.name}: would train {len(students)} students ({num_trained} exist) and sample "
            f"{len(lines_of(settings, panel))} lines at {len(job.recipe.evaluation.guidance)} guidance scales"
        )
    return lines or ["nothing: this recipe has no ablation"]


main = recipe_verb("ablate", ablate, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
