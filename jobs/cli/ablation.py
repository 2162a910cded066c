"""Trains the students of an ablation in the run, and evaluates its panels."""

from typing import Any, TypedDict

from jobs.cli.in_run import table_starter
from jobs.cli.job import Job
from jobs.cli.resources import runner
from jobs.evaluation.results import EvaluationResults
from jobs.evaluation.settings import Contender, EvaluationSettings, FidGap
from jobs.recipes.ablation import (
    AblationSettings,
    Line,
    Panel,
    StudentVariant,
    contender_name,
    of_seed,
    table_name,
)
from jobs.runtime.logs import logger
from jobs.training.metrics import METRICS
from jobs.training.settings import VpredSettings
from pipelines.storage.objects import exists


class PanelResults(TypedDict):
    """The results of a panel, whose keys are those of its file.

    Attributes:
        panel: its settings.
        seeds: of training.
        command: that made it.
        settings: digest of the recipe.
        training: settings of the training loop, but for what a student has of its own.
        students: settings of the students.
        over_seeds: mean over seeds of each metric of each line, with its interval; the same at the guidance
            that was chosen on the tuning captions; and the differences to the lines that it is compared with,
            averaged over guidance.
        evaluation: the results by line and seed.
    """

    panel: dict[str, Any]
    seeds: list[int]
    command: str
    settings: str
    training: dict[str, Any]
    students: list[dict[str, Any]]
    over_seeds: list[dict[str, Any]]
    evaluation: EvaluationResults


def students_of(settings: AblationSettings, panel: Panel) -> list[tuple[StudentVariant, int]]:
    """The students of a panel by seed, each after those that it starts from."""
    names = [line.variant for line in panel.lines if line.variant is not None]
    students = {
        (variant.name, seed): (variant, seed)
        for seed in settings.seeds_of(panel)
        for name in names
        # A student that starts from another one needs that of the same seed.
        for variant in settings.lineage(name)
    }
    return list(students.values())


def lines_of(settings: AblationSettings, panel: Panel) -> list[tuple[Line, int]]:
    """The lines of a panel by seed; a line without a student has one seed."""
    seeds = settings.seeds_of(panel)
    return [(line, seed) for line in panel.lines for seed in (range(1) if line.variant is None else seeds)]


def student_url(job: Job, name: str, *, seed: int) -> str:
    """URL of a student's folder."""
    return job.url(f"students/{name}-seed{seed}")


def is_trained(job: Job, name: str, *, seed: int) -> bool:
    """Whether a student is published."""
    return exists(f"{student_url(job, name, seed=seed)}/{METRICS}")


def model_of(job: Job, line: Line, *, seed: int) -> str | None:
    """Source of the model of a line's student; None if it has none."""
    return None if line.variant is None else f"{student_url(job, line.variant, seed=seed)}/model"


def initial_model(job: Job) -> str:
    """Source of the model that students start from."""
    return job.resolve(job.recipe.ablation.model)


def train_student(job: Job, variant: StudentVariant, *, seed: int) -> None:
    """Train a student, unless it is published already."""
    from jobs.training.distillation import distill_steps, summary
    from jobs.training.velocity import finetune_vpred

    if is_trained(job, variant.name, seed=seed):
        return
    logger.info(f"[{variant.name}, seed {seed}]")
    distill, initial = job.recipe.distill, initial_model(job)
    if variant.after is not None:
        initial = f"{student_url(job, variant.after, seed=seed)}/model"
    own = {"num_steps": variant.num_steps, "learning_rate": variant.learning_rate}
    changes = {name: value for name, value in own.items() if value is not None}
    loop = distill.loop.model_copy(update={"seed": seed, **changes})
    latents_url, out_url = job.url("latents"), student_url(job, variant.name, seed=seed)
    if variant.steps is None:
        # The control: trained for as long by L_ori alone.
        control = VpredSettings(
            loop=loop, loader=distill.loader, evaluation_rows=distill.evaluation_rows, trainer=distill.trainer
        )
        finetune_vpred(control, model=initial, latents_url=latents_url, out_url=out_url, further=True)
        return
    settings = distill.model_copy(update={"name": variant.name, "loop": loop, "steps": variant.steps})
    metrics = distill_steps(settings, teacher=initial, data_url=latents_url, out_url=out_url)
    for line in summary(metrics):
        logger.info(f"  {line}")


def evaluate_panel(job: Job, panel: Panel) -> PanelResults:
    """Sample and score the lines of a panel."""
    from jobs.cli.panel_seeds import over_seeds
    from jobs.evaluation.evaluation import evaluate

    settings = job.recipe.ablation
    results = evaluate(
        panel_evaluation(job, panel),
        model=initial_model(job),
        out=job.url("evaluation"),
        start=table_starter(job),
        run=runner(job, "evaluation"),
    )
    seeds = settings.seeds_of(panel)
    return {
        "panel": panel.to_values(),
        "seeds": list(seeds),
        "command": f"python -m jobs.ablate --recipe {job.recipe.name}",
        "settings": job.recipe.digest(),
        "training": job.recipe.distill.loop.to_values(),
        "students": [variant.to_values() for variant, seed in students_of(settings, panel) if seed == 0],
        "over_seeds": list(over_seeds(panel, seeds=seeds, results=results)),
        "evaluation": results,
    }


def panel_evaluation(job: Job, panel: Panel) -> EvaluationSettings:
    """The evaluation of a panel, whose contenders are its lines by seed."""
    lines = lines_of(job.recipe.ablation, panel)
    contenders = tuple(
        Contender(
            name=contender_name(line, seed),
            model=model_of(job, line, seed=seed),
            sampler=line.sampler,
            table=table_name(line, seed),
            family=line.family and of_seed(line, line.family, seed),
        )
        for line, seed in lines
    )
    gaps = tuple(
        FidGap(student=contender_name(line, seed), few=panel.baseline, many=panel.many, w=w)
        for line, seed in lines
        if line.variant is not None
        for w in panel.gap_at
    )
    controls = (contender_name(line, seed) for line, seed in lines if line.name == panel.control)
    against = {"baseline": panel.baseline, "also_against": (panel.many, *controls), "gaps": gaps}
    return job.recipe.evaluation.model_copy(update={"contenders": contenders, **against})
