"""Fails a job whose rows were all rejected."""

from pipelines.rejections import DELETIONS, REASONS
from pipelines.tables.manifest import total_rejected
from pipelines.tables.table import Snapshot


class NoUsableRows(RuntimeError):
    """A table all of whose rows were rejected."""


def check_usable(name: str, table: Snapshot) -> None:
    """Check that a table has rows, unless there were none to make.

    Raises:
        NoUsableRows: if every row was rejected, for another reason than a deletion request.
    """
    manifests = table.manifests().values()
    counts = total_rejected(manifests)
    faults = {reason: count for reason, count in counts.items() if reason not in DELETIONS}
    if faults and table.num_rows == 0:
        reason = max(faults, key=lambda each: faults[each])
        rejections = (row for manifest in manifests for row in manifest.rejections if row.reason == reason)
        first = min(rejections, key=lambda row: (row.source, row.ordinal))
        raise NoUsableRows(
            f"{name}: none of {sum(counts.values())} rows is usable; {faults[reason]} are {reason}: "
            f"{REASONS[reason]}; the first is {first.id}{first.detail and f': {first.detail}'}"
        )
