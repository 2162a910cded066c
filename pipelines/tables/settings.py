"""Bounds on a job that fills a table."""

from __future__ import annotations

from pydantic import Field

from snapfusion.settings import Settings


class Bounds(Settings):
    """When to commit, and when to stop.

    Attributes:
        commit_seconds: units that arrive within this time share a commit.
        max_rejected: fraction of rows read that may be set aside.
        judged_after: rows read before the fraction is judged.
        max_rows: rows to read in this run, rounded up to whole units; the next run goes on. None: all.
        max_seconds: after which this run commits what has arrived and ends; the next goes on. None: never.
    """

    commit_seconds: float = Field(5.0, ge=0.0)
    max_rejected: float = Field(0.5, ge=0.0, le=1.0)
    judged_after: int = Field(200, ge=0)
    max_rows: int | None = Field(None, ge=1)
    max_seconds: float | None = Field(None, gt=0.0)
