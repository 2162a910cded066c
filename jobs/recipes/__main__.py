"""List the recipes, or print one as YAML, which --config reads."""

import click
import yaml

from jobs.cli.verb import Options, plain_verb
from jobs.recipes.registry import RECIPES, recipe_named


def show(options: Options) -> None:
    """Print a recipe as YAML; without a name, one line for each recipe."""
    if options.name is not None:
        values = recipe_named(options.name).to_values()
        click.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100), nl=False)
        return
    for name, recipe in RECIPES.items():
        click.echo(f"{name:<16}{(recipe.__doc__ or '').splitlines()[0]}")


main = plain_verb("recipes", show, about=__doc__, options=[click.Argument(["name"], required=False)])

if __name__ == "__main__":
    main.exit()
