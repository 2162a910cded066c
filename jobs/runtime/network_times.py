"""Keeps in which time the networks of this process's tables computed, for the record of a step."""

from pipelines.tables.network_time import NetworkTime


class NetworkTimes:
    """The newest `NetworkTime` of each table that a step makes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all tables."""
        self._tables = list[NetworkTime]()

    def add_table(self) -> int:
        """Add a table; returns its number."""
        self._tables.append(NetworkTime())
        return len(self._tables) - 1

    def update(self, table: int, time: NetworkTime) -> None:
        """Set the time of a table, unless it was forgotten."""
        if table < len(self._tables):
            self._tables[table] = time

    @property
    def busy_share(self) -> float | None:
        """`NetworkTime.busy_share` of all tables together."""
        return sum(self._tables, NetworkTime()).busy_share


NETWORK_TIMES = NetworkTimes()
"""Those of this process."""
