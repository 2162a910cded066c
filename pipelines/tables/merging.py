"""Merges the files of `.units`, of which each commit adds one, into fewer and larger ones.

 32 files of commits ─ 1 file of level 1; 32 of those ─ 1 of level 2, which stays

So each row is written three times, and after 20,000 commits a reader opens at most 81 files. The merged ones
stay until a vacuum: somebody may be reading them.
"""

import re
from typing import Final

from pipelines.tables.open_log import OpenLog
from pipelines.tables.table import live_names, read_sibling_files
from pipelines.tables.transactions import Action, add_rows, remove_file, try_commit

MERGED_PREFIX: Final = "merged-"
"""Prefix of the names of merged files; it is on disk and stays."""

FAN_IN: Final = 32
"""Files of one level that make one of the next."""

_LEVELS: Final = 2
_NAME = re.compile(MERGED_PREFIX + r"(\d+)-")


def merge_unit_files(log: OpenLog) -> None:
    """Merge files of `.units`, whose log is given, as long as there are `FAN_IN` of a level.

    A merge that another commit comes in between of is left to a later call.
    """
    for level in range(_LEVELS):
        while True:
            # Files are chosen and removed on one snapshot: if another writer replaces one, the log refuses.
            delta = log.newest()
            names = sorted(name for name in live_names(delta) if _level_of(name) == level)[:FAN_IN]
            if len(names) < FAN_IN:
                break
            rows = read_sibling_files(log.location, names)
            prefix = f"{MERGED_PREFIX}{level + 1}-"
            merged = add_rows(log.location, rows, prefix=prefix, compression="zstd")
            actions: list[Action] = [*map(remove_file, names), merged]
            if not try_commit(delta, log.location, actions, []):
                return


def _level_of(name: str) -> int:
    """How often the rows of a file have been merged, by its name."""
    found = _NAME.match(name)
    return int(found[1]) if found else 0
