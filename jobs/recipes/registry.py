"""Recipes by name."""

from jobs.recipes.miniature import ablation, mini, mini_efficient
from jobs.recipes.recipe import Recipe
from jobs.recipes.renamed import RENAMED_RECIPES
from jobs.recipes.stable_diffusion import sd2, sd15
from snapfusion.settings import SettingsError

RECIPES = {
    "mini": mini,
    "ablation": ablation,
    "mini-efficient": mini_efficient,
    "sd15": sd15,
    "sd2": sd2,
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SettingsError: if there is none.
    """
    if name in RENAMED_RECIPES:
        raise SettingsError(f"--recipe {name}: the recipe has been renamed to {RENAMED_RECIPES[name]}")
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: there is no such recipe; accepted are {', '.join(RECIPES)}")
    return RECIPES[name]()
