"""Settings of committing units."""

from typing import Final

from pydantic import Field

from snapfusion.settings import Settings

CHECK_FILES_VARIABLE: Final = "SNAPFUSION_CHECK_FILES"
"""Environment variable that turns off the checks of data files that are read, by the value 0."""


class Bounds(Settings):
    """Bounds on the time between commits, and on a run.

    Attributes:
        commit_seconds: units that arrive within this time share a commit.
        max_rejected: largest fraction of the rows read that may be rejected.
        judged_after: rows read before `max_rejected` applies.
        max_rejected_shards: largest fraction of the shards that may be rejected: torn, no shard, or another
            than before.
        shards_judged_after: shards read before `max_rejected_shards` applies.
        max_rows: rows to read in this run, rounded up to whole units; the next run continues. None: all.
        max_seconds: time after which this run commits what has arrived and ends; the next continues. None: no
            limit.
    """

    commit_seconds: float = Field(5.0, ge=0.0)
    max_rejected: float = Field(0.5, ge=0.0, le=1.0)
    judged_after: int = Field(200, ge=0)
    max_rejected_shards: float = Field(0.5, ge=0.0, le=1.0)
    shards_judged_after: int = Field(10, ge=1)
    max_rows: int | None = Field(None, ge=1)
    max_seconds: float | None = Field(None, gt=0.0)
