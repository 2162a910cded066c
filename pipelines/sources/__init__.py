"""Readers of input data: image shards, URL lists and caption lists."""


class SourceError(ValueError):
    """A source that is missing or malformed; the message says what to give."""


def check_range(start: int, stop: int | None) -> None:
    """Check a range of ordinals [start, stop).

    Raises:
        ValueError: unless 0 <= start <= stop.
    """
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"start {start} and stop {stop} given; 0 <= start <= stop is accepted")
