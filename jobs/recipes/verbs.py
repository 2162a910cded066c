"""Names the jobs of a recipe, so that a plan of them needs no entry point."""

from jobs.recipes.recipe import Recipe
from jobs.recipes.stages import starts_from
from jobs.training.sources import EFFICIENT_MODEL, RUN_PREFIX, VPRED_MODEL


def pipeline_verbs(recipe: Recipe) -> list[str]:
    """Jobs of `jobs.run_pipeline` in order, without those that this recipe does not need."""
    distill = recipe.distill
    scheduled = compiles_from_schedule(recipe)
    single = distill.teacher is not None and not scheduled
    efficient = single and distill.student == EFFICIENT_MODEL
    begins = {distill.teacher, distill.student, recipe.efficient.begin if efficient else None}
    needed = {
        "render_scenes": recipe.source.url is None,
        "find_duplicates": recipe.deduplication.use,
        "encode_latents": True,
        "finetune_vpred": single and VPRED_MODEL in begins,
        "measure_latency": efficient,
        "train_efficient": efficient,
        "compute_targets": single and distill.targets == "table",
        "distill_steps": single,
        "distill_schedule": scheduled,
        "generate_pairs": True,
        "distill_decoder": True,
        "evaluate": _evaluates_what_is_made(recipe),
        "compile_mobile": True,
    }
    return [verb for verb, is_needed in needed.items() if is_needed]


def compiles_from_schedule(recipe: Recipe) -> bool:
    """Whether the model that is compiled is a student of the recipe's schedule."""
    return recipe.mobile.model in {f"{RUN_PREFIX}{stage.name}/model" for stage in recipe.stages}


def _evaluates_what_is_made(recipe: Recipe) -> bool:
    """Whether the evaluation compares models of the run, all of which the pipeline makes."""
    students = [stage.name for stage in recipe.stages] if compiles_from_schedule(recipe) else []
    made = {f"{RUN_PREFIX}{name}/model" for name in (*students, recipe.distill.name)}
    made |= {EFFICIENT_MODEL, VPRED_MODEL}
    compared = {one.model for one in recipe.evaluation.contenders if (one.model or "").startswith(RUN_PREFIX)}
    return bool(compared) and compared <= made


def initial_verbs(recipe: Recipe) -> list[str]:
    """Jobs that train the models a schedule starts from: the v model, and the efficient one made of it."""
    efficient = starts_from(recipe.stages, EFFICIENT_MODEL)
    vpred = starts_from(recipe.stages, VPRED_MODEL)
    vpred = vpred or (efficient and recipe.efficient.begin == VPRED_MODEL)
    return ["finetune_vpred"] * vpred + ["train_efficient"] * efficient
