"""Tells shards that are still being written, or were left unfinished lately, from those that can be read."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.sources.listing import SourceFile
from pipelines.sources.stats import stats_url
from pipelines.storage.objects import IO_THREADS, exists, open_object

_TAR_END = bytes(1024)
_PARQUET_END = b"PAR1"


def unfinished_shards(
    shards: Sequence[SourceFile], *, settle: float, now: float | None = None
) -> list[SourceFile]:
    """The shards that changed less than `settle` seconds ago and do not look finished.

    A tar looks finished if it has an end and beside it img2dataset's `_stats.json`, which is written last; a
    Parquet file if it has an end. Only shards that changed lately are opened.

    Args:
        shards: as `list_shards` gives them.
        settle: seconds; 0 takes every shard as it is.
        now: seconds since 1970; by default the present.

    Raises:
        OSError: if the store fails.
    """
    now = time.time() if now is None else now
    # The absolute value, so that a clock that is wrong by years keeps no shard waiting.
    recent = [shard for shard in shards if shard.modified and abs(now - shard.modified) < settle]
    with ThreadPoolExecutor(IO_THREADS) as threads:
        finished = list(threads.map(_looks_finished, recent))
    return [shard for shard, is_finished in zip(recent, finished, strict=True) if not is_finished]


def _looks_finished(shard: SourceFile) -> bool:
    if not shard.url.endswith(".tar"):
        return _ends_with(shard, _PARQUET_END)
    return exists(stats_url(shard.url)) and _ends_with(shard, _TAR_END)


def _ends_with(shard: SourceFile, end: bytes) -> bool:
    with open_object(shard.url, ahead=len(end)) as file:
        file.seek(max(shard.size - len(end), 0))
        return file.read(len(end)) == end
