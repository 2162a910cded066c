"""Holds the progress reports of workers until the driver fetches them."""

from typing import Any


class ReportQueue:
    """An actor that holds progress reports.

    It has a module of its own because Ray's controller imports whatever defines an actor it passes on.
    """

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []

    def put(self, report: dict[str, Any]) -> None:
        """Append a report."""
        self._reports.append(report)

    def take(self) -> list[dict[str, Any]]:
        """Remove and return all reports."""
        reports, self._reports = self._reports, []
        return reports
