"""Recomputes units for `verify_table`, with the inputs and on the kind of device that they were made with."""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from pipelines.stages.settings import Device
from pipelines.stages.write import pack
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.units import FinishedRows
from pipelines.tables.verification import Recompute
from snapfusion.settings import differences


def packed(schema: pa.Schema, recompute: Callable[[UnitManifest, pa.Table], FinishedRows]) -> Recompute:
    """A function for `verify_table` that recomputes a unit and packs it as it was written."""

    def recompute_table(manifest: UnitManifest, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """The unit's table, and the environment that it was computed in."""
        finished = recompute(manifest, rows)
        return pack(finished, schema), finished.environment

    return recompute_table


def device_of(table: Snapshot, manifest: UnitManifest) -> Device:
    """The device settings that a unit was made with, on whatever device there is."""
    return Device(dtype=table.identity["dtype"], threads=manifest.environment["threads"])


def check_same(table: Snapshot, expected: Mapping[str, Any], what: str) -> None:
    """Refuse to recompute a table with other inputs than those it was made with.

    Raises:
        TableError: naming the first differences from the expected part of the identity.
    """
    recorded = {name: table.identity.get(name) for name in expected}
    if differing := list(differences(recorded, dict(expected))):
        raise TableError(f"{table.url} was made with another {what}: {'; '.join(differing[:3])}")
