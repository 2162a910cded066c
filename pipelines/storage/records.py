"""Reads JSON records from a disk or a store."""

from pipelines.storage.objects import read_bytes
from snapfusion.records import Record, parse_record


def read_record(url: str) -> Record:
    """The object of the JSON file at `url`.

    Raises:
        StorageError: if it cannot be read.
        RecordError: if it is damaged, or holds no object.
    """
    return parse_record(read_bytes(url), name=url)
