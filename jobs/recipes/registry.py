"""Recipes by name."""

from collections.abc import Callable

from jobs.recipes.miniature import ablation, mini, mini_efficient
from jobs.recipes.recipe import Recipe
from jobs.recipes.renamed import RENAMED_RECIPES
from jobs.recipes.stable_diffusion import own, sd2, sd15, sd15_one_gpu
from snapfusion.settings import SettingsError

RECIPES: dict[str, Callable[..., Recipe]] = {
    "mini": mini,
    "ablation": ablation,
    "mini-efficient": mini_efficient,
    "own": own,
    "sd15": sd15,
    "sd15-1gpu": sd15_one_gpu,
    "sd2": sd2,
}
"""Each makes its recipe for the source of a model; without one, for the model that it is named after."""


def recipe_named(name: str, *, model: str | None = None) -> Recipe:
    """The recipe of that name, for a model of one's own if one is given.

    Raises:
        SettingsError: if there is no such recipe.
        ModelError: if there is no such model.
    """
    if name in RENAMED_RECIPES:
        raise SettingsError(f"--recipe {name}: the recipe has been renamed to {RENAMED_RECIPES[name]}")
    if name not in RECIPES:
        raise SettingsError(f"--recipe {name}: there is no such recipe; accepted are {', '.join(RECIPES)}")
    return RECIPES[name]() if model is None else RECIPES[name](model)
