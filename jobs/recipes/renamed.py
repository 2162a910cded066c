"""Names of version 0.1 in settings, and what replaced them."""

from collections.abc import Iterable

from snapfusion.settings import SettingsError

RENAMED_SECTIONS = {
    "allowance": "quota",
    "chance": "random_baseline",
    "plan": "schedule",
    "plans": "schedules",
}
"""Keys at the top of a recipe: new by old."""

RENAMED_KEYS = {
    "pictures": "images",
    "pictures_at": "images_at",
    "place": "folder",
    "watch": "validation",
}
"""Keys anywhere below: new by old."""

RENAMED_RECIPES = {"twin": "mini-efficient"}


def refuse_renamed(assignments: Iterable[str]) -> None:
    """Refuse assignments such as ``plan=direct`` to a key of version 0.1.

    Raises:
        SettingsError: naming the new key.
    """
    for assignment in assignments:
        key = assignment.partition("=")[0]
        if (new := new_key(key)) != key:
            raise SettingsError(f"{key} has been renamed: set {new}")


def new_key(key: str) -> str:
    """Today's name of a dotted key; `key` itself unless it was renamed."""
    first, *others = key.split(".")
    return ".".join([RENAMED_SECTIONS.get(first, first), *(RENAMED_KEYS.get(part, part) for part in others)])
