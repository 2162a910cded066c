"""Keys and recipes of version 0.1 are refused with their new names."""

from pathlib import Path

import pytest

from jobs.cli.job import resolve_recipe
from jobs.recipes.registry import recipe_named
from jobs.recipes.renamed import RENAMED_KEYS, RENAMED_RECIPES, RENAMED_SECTIONS, new_key
from snapfusion.settings import SettingsError

CHANGELOG = Path(__file__).parents[3] / "CHANGELOG.md"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("plan", "schedule"),
        ("plans.direct", "schedules.direct"),
        ("allowance.rows", "quota.rows"),
        ("chance.count", "random_baseline.count"),
        ("download.place", "download.folder"),
        ("deduplication.evaluation.pictures", "deduplication.evaluation.images"),
        ("ablation.pictures_at", "ablation.images_at"),
        ("vpred.validation.pictures", "vpred.validation.images"),
        ("distill.watch.every", "distill.validation.every"),
        ("robust.training.watch.steps", "robust.training.validation.steps"),
        ("chance.training.watch.every", "random_baseline.training.validation.every"),
    ],
)
def test_old_keys_are_refused_with_new(old: str, new: str) -> None:
    with pytest.raises(SettingsError, match=f"{old} .*{new}"):
        resolve_recipe("mini", [f"{old}=1"])
    assert new_key(new) == new


def test_old_recipes_are_refused_with_new() -> None:
    with pytest.raises(SettingsError, match="mini-efficient"):
        recipe_named("twin")


@pytest.mark.parametrize("renamed", [RENAMED_SECTIONS, RENAMED_KEYS, RENAMED_RECIPES])
def test_changelog_has_each_renamed_key(renamed: dict[str, str]) -> None:
    for name in [*renamed, *renamed.values()]:
        assert name in CHANGELOG.read_text()
