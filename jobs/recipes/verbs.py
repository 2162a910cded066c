"""Names the jobs of a recipe, so that a plan of them needs no entry point."""

from jobs.recipes.recipe import Recipe
from jobs.recipes.stages import starts_from
from jobs.training.sources import EFFICIENT_MODEL, VPRED_MODEL


def pipeline_verbs(recipe: Recipe) -> list[str]:
    """Jobs of `jobs.run_pipeline` in order, without those that this recipe does not need."""
    distill = recipe.distill
    efficient = distill.teacher is not None and distill.student == EFFICIENT_MODEL
    needed = {
        "render_scenes": recipe.source.url is None,
        "find_duplicates": recipe.deduplication.use,
        "encode_latents": True,
        "measure_latency": efficient,
        "train_efficient": efficient,
        "distill_steps": distill.teacher is not None,
        "generate_pairs": True,
        "distill_decoder": True,
        "compile_mobile": True,
    }
    return [verb for verb, is_needed in needed.items() if is_needed]


def initial_verbs(recipe: Recipe) -> list[str]:
    """Jobs that train the models a schedule starts from: the v model, and the efficient one made of it."""
    efficient = starts_from(recipe.stages, EFFICIENT_MODEL)
    vpred = starts_from(recipe.stages, VPRED_MODEL)
    vpred = vpred or (efficient and recipe.efficient.begin == VPRED_MODEL)
    return ["finetune_vpred"] * vpred + ["train_efficient"] * efficient
