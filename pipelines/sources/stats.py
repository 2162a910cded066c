"""Reads the row counts in `<shard>_stats.json`, which img2dataset writes when a shard is finished."""

import json
from dataclasses import dataclass
from typing import Any, Final, Self

from pipelines.storage.objects import open_object

# img2dataset's default is 10,000 rows a shard; a count beyond this is no count of rows.
_MAX_ROWS: Final = 1 << 20
_MAX_BYTES: Final = 16 << 20


def stats_url(url: str) -> str:
    """The URL of the stats file of the shard at `url`."""
    return f"{url.rpartition('.')[0]}_stats.json"


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """Numbers of rows of a shard.

    Attributes:
        count: all of them.
        failed_to_download: without an image.
        failed_to_resize: likewise.
    """

    count: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0

    @classmethod
    def read(cls, url: str) -> Self | None:
        """The numbers in the stats file of the shard at `url`; None without a plausible one.

        Raises:
            OSError: if the store fails.
        """
        try:
            with open_object(stats_url(url), ahead=1 << 16) as file:
                values = json.loads(file.read(_MAX_BYTES))
            return cls(**{name: _rows(values.get(name, 0)) for name in cls.__dataclass_fields__})
        except (FileNotFoundError, ValueError, RecursionError, AttributeError):
            return None


def _rows(value: Any) -> int:  # noqa: ANN401 - any JSON value
    if not isinstance(value, int) or not 0 <= value <= _MAX_ROWS:
        raise ValueError(f"{value!r} rows")
    return value
