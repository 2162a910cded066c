"""What each job of a run reads and makes there, by which a pipeline is checked before it starts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.evaluation.weight_files import missing_weights
from jobs.recipes.recipe import EXAMPLE_BUCKET, Recipe
from jobs.recipes.verbs import initial_verbs
from jobs.training.sources import RUN_PREFIX
from snapfusion.settings import flatten

_SECTIONS = {
    "find_duplicates": ("deduplication",),
    "encode_latents": ("source",),
    "generate_pairs": ("captions",),
    "evaluate": ("evaluation",),
    "compile_mobile": ("mobile",),
}
"""Sections of the recipe with URLs that a job reads."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A job, or a stage of the schedule.

    Attributes:
        name: of the job or the stage.
        makes: name in the run of what it makes.
        reads: sources that it reads, by the setting that names each; None for one that is not set.
    """

    name: str
    makes: str
    reads: dict[str, str | None]


def missing_inputs(recipe: Recipe, verbs: Sequence[str], *, exists: Callable[[str], bool]) -> list[str]:
    """Say what jobs read in the run that neither an earlier one makes nor the run has, a line each.

    Args:
        recipe: of the jobs.
        verbs: the jobs in order.
        exists: whether the run has a file or folder of that name.
    """
    made, lines = set[str](), list[str]()
    for step in (step for verb in verbs for step in _steps(recipe, verb)):
        for setting, source in step.reads.items():
            if source is None or not source.startswith(RUN_PREFIX):
                continue
            path = source.removeprefix(RUN_PREFIX)
            if path.split("/")[0] not in made and not exists(path):
                lines.append(f"{setting} is {source}, which no step before {step.name} makes")
        made.add(step.makes)
    return lines


def missing_values(recipe: Recipe, verbs: Sequence[str]) -> list[str]:
    """Say which settings of jobs have the recipe's example, nothing, or weights that are not there."""
    sections = {"model", *(section for verb in verbs for section in _SECTIONS.get(verb, ()))}
    lines = [
        f"{key} is the example {value}; give your own, as in --set {key}=..."
        for key, value in flatten(recipe.to_values())
        if key.split(".")[0] in sections and str(value).startswith(EXAMPLE_BUCKET)
    ]
    if "evaluate" in verbs:
        lines += missing_weights(recipe.evaluation, examples=EXAMPLE_BUCKET)
    return lines + (recipe.mobile.licence.problems() if "compile_mobile" in verbs else [])


def _steps(recipe: Recipe, verb: str) -> Iterator[Step]:
    """The steps of a job: those of its stages if it is the schedule, else itself."""
    if verb != "distill_schedule":
        name_of, reads_of = _JOBS[verb]
        yield Step(name=verb, makes=name_of(recipe), reads=reads_of(recipe))
        return
    for initial in initial_verbs(recipe):
        yield from _steps(recipe, initial)
    for number, stage in enumerate(recipe.stages):
        reads = _values(stage, f"schedules.{recipe.schedule}[{number}]", "teacher", "student", "table")
        yield Step(name=stage.name, makes=stage.name, reads=reads)


def _values(settings: Any, prefix: str, *names: str) -> dict[str, str | None]:  # noqa: ANN401 - settings
    return {f"{prefix}.{name}": getattr(settings, name) for name in names}


def _nothing(recipe: Recipe) -> dict[str, str | None]:
    return {}


def _distill_reads(recipe: Recipe) -> dict[str, str | None]:
    reads = _values(recipe.distill, "distill", "teacher", "student", "table")
    return reads | {"distill.table": recipe.distill.table or f"{RUN_PREFIX}{recipe.distill.table_kind}"}


def _evaluation_reads(recipe: Recipe) -> dict[str, str | None]:
    reads = dict[str, str | None]()
    for number, contender in enumerate(recipe.evaluation.contenders):
        reads |= _values(contender, f"evaluation.contenders[{number}]", "model", "decoder")
    return reads


_JOBS: dict[str, tuple[Callable[[Recipe], str], Callable[[Recipe], dict[str, str | None]]]] = {
    "render_scenes": (lambda _: "shards", _nothing),
    "find_duplicates": (lambda recipe: recipe.deduplication.table, _nothing),
    "encode_latents": (lambda recipe: recipe.source.table, _nothing),
    "finetune_vpred": (lambda _: "vpred", _nothing),
    "measure_latency": (lambda _: "latency", _nothing),
    "train_efficient": (
        lambda _: "efficient",
        lambda recipe: _values(recipe.efficient, "efficient", "begin", "architecture"),
    ),
    "compute_targets": (
        lambda _: "targets",
        lambda recipe: _values(recipe.distill, "distill", "teacher", "student"),
    ),
    "distill_steps": (lambda recipe: recipe.distill.name, _distill_reads),
    "generate_pairs": (lambda _: "pairs", lambda recipe: _values(recipe.captions, "captions", "url")),
    "distill_decoder": (lambda _: "decoder", _nothing),
    "evaluate": (lambda _: "evaluation", _evaluation_reads),
    "compile_mobile": (
        lambda _: "mobile",
        lambda recipe: _values(recipe.mobile, "mobile", "model", "decoder"),
    ),
}
"""Name of what each job makes in the run, and the sources that its settings name."""
