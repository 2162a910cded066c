"""Counts the seconds in which a job's driver works alone, after its workers."""

import time


class DriverClock:
    """A clock that runs while no worker works for the driver.

    A table that was complete, of which no row arrives, does not start it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._seconds = 0.0
        self._since: float | None = None
        self._has_run = False

    def pause(self) -> None:
        """Pause: workers begin."""
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None

    def run_from_now(self) -> None:
        """Run from now on, and not from an earlier call: workers have done something, perhaps all.

        Called after each row, it counts the time after the last.
        """
        self._since, self._has_run = time.monotonic(), True

    @property
    def seconds(self) -> float | None:
        """Seconds so far; None if no worker has done anything."""
        if not self._has_run:
            return None
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)


DRIVER_CLOCK = DriverClock()
"""The clock of this process."""
