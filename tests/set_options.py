"""Options of a command line from assignments of settings."""

from collections.abc import Iterable


def set_options(assignments: Iterable[str]) -> list[str]:
    """`--set` before every assignment."""
    return [word for assignment in assignments for word in ("--set", assignment)]
