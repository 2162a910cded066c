"""Quota of one scheduled run: rows, minutes, or their cost."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipelines.tables.settings import Bounds
from snapfusion.settings import Settings


class Quota(Settings):
    """Bounds of one run of `jobs.top_up`, which ends at the first one reached; None is no bound.

    Attributes:
        rows: to read, rounded up to whole units.
        minutes: of work, from its submission to the cluster.
        budget: in the currency of `price_per_hour`.
        price_per_hour: of everything that runs meanwhile; converts the budget into minutes.
    """

    rows: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0.0)
    budget: float | None = Field(None, gt=0.0)
    price_per_hour: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> Self:
        if (self.budget is None) != (self.price_per_hour is None):
            raise ValueError("budget and price_per_hour must be given together")
        return self

    @property
    def seconds(self) -> float | None:
        """The shorter of `minutes` and the time that the budget pays, in seconds."""
        limits = [60 * self.minutes] if self.minutes is not None else []
        if self.budget is not None and self.price_per_hour is not None:
            limits.append(3600 * self.budget / self.price_per_hour)
        return min(limits, default=None)

    def bound(self, bounds: Bounds) -> Bounds:
        """A table's bounds, with these."""
        return bounds.model_copy(update={"max_rows": self.rows, "max_seconds": self.seconds})
