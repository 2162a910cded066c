"""What one scheduled run may do: rows, minutes, or what they cost."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipelines.tables.settings import Bounds
from snapfusion.settings import Settings


class Quota(Settings):
    """Bounds of one run of `jobs.top_up`; the first that is met ends it. None: no bound.

    Attributes:
        rows: to be read, rounded up to whole units.
        minutes: of work, from when the cluster is asked for it.
        budget: in the currency of `price_per_hour`.
        price_per_hour: of everything that runs meanwhile; it turns the budget into minutes.
    """

    rows: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0.0)
    budget: float | None = Field(None, gt=0.0)
    price_per_hour: float | None = Field(None, gt=0.0)

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> Self:
        if (self.budget is None) != (self.price_per_hour is None):
            raise ValueError("budget and price_per_hour are given together, or neither is")
        return self

    @property
    def seconds(self) -> float | None:
        """The shorter of what `minutes` and the budget allow."""
        allowed = []
        if self.minutes is not None:
            allowed.append(60 * self.minutes)
        if self.budget is not None and self.price_per_hour is not None:
            allowed.append(3600 * self.budget / self.price_per_hour)
        return min(allowed, default=None)

    def bound(self, bounds: Bounds) -> Bounds:
        """A table's bounds, and these."""
        return bounds.model_copy(update={"max_rows": self.rows, "max_seconds": self.seconds})
