"""Settings that no step of a recipe's pipeline reads, so that a run prints those that concern it."""

from jobs.recipes.recipe import Recipe
from jobs.recipes.verbs import initial_verbs, pipeline_verbs

READERS = {
    "ablation": ("ablate",),
    "compaction": ("compact",),
    "efficiency": ("measure_efficiency",),
    "evolution": ("evolve_unet", "compare_chance"),
    "export": ("export_table",),
    "quota": ("top_up",),
    "random_baseline": ("compare_chance",),
    "robust": ("train_robust",),
    "targets": ("compute_targets",),
    "vacuum": ("vacuum",),
    "verification": ("verify_table",),
    "vpred": ("finetune_vpred",),
}
"""Sections of a recipe that certain jobs alone read, and the planner. Others may be read by any job."""


def unread_by_pipeline(recipe: Recipe) -> list[str]:
    """Dotted keys of the settings, and of mappings of them, that no step of the pipeline reads."""
    verbs = {*pipeline_verbs(recipe)}
    if "distill_schedule" in verbs:
        verbs |= {*initial_verbs(recipe)}
    sections = [section for section, readers in READERS.items() if verbs.isdisjoint(readers)]
    return [*sections, *(f"schedules.{name}" for name in recipe.schedules if name != recipe.schedule)]
