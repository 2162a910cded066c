"""Rates: seconds that one worker takes for one unit of work, measured by a probe or given."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from jobs.planning.builtin_lists import NamedList
from pipelines.costs.stage import WorkKind
from snapfusion.settings import Settings


class Rate(Settings):
    """Rate of a kind of work.

    Attributes:
        seconds: of one unit on one worker.
        gmacs: 10^9 multiply-accumulates of the network in one unit's forward pass; another network's time is
            in proportion. Null for work without a network.
    """

    seconds: PositiveFloat
    gmacs: PositiveFloat | None = None


class StartupSeconds(Settings):
    """Fixed seconds before and after work.

    Attributes:
        ray: a local cluster, once a process.
        job: the actors of a data job and their networks.
        training: the workers of a training, and everything loaded and saved around it.
    """

    ray: NonNegativeFloat = 0.0
    job: NonNegativeFloat = 0.0
    training: NonNegativeFloat = 0.0


class Contention(Settings):
    """Slowdown of work when it occupies every core of a machine without accelerators.

    Attributes:
        tables: factor on the time of a unit of a table.
        trainings: factor on a training step, including the wait for other workers.
    """

    tables: Annotated[float, Field(ge=1.0)] = 1.0
    trainings: Annotated[float, Field(ge=1.0)] = 1.0


class Rates(NamedList):
    """Rates of one kind of machine.

    Attributes:
        worker: one worker, as in "an A100" or "one thread of ...".
        date: on which they were measured or collected.
        rates: by kind; of several, the one whose network is nearest in size counts.
        checkpointed: whether `train` was measured with gradient checkpointing; if not, a training that uses
            it takes one more pass per row.
        crowding: contention of workers on all cores.
        starts: fixed time before and after work.
        png_share: size of a PNG as a fraction of its pixels' bytes.
    """

    kind = "rates"
    worker: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    rates: dict[WorkKind, Annotated[tuple[Rate, ...], Field(min_length=1)]]
    checkpointed: bool = False
    crowding: Contention = Contention()
    starts: StartupSeconds = StartupSeconds()
    png_share: Annotated[float, Field(gt=0.0, le=1.1)] = 0.6

    @model_validator(mode="after")
    def _several_rates_state_their_size(self) -> Rates:
        for kind, rates in self.rates.items():
            if len(rates) > 1 and any(rate.gmacs is None for rate in rates):
                raise ValueError(f"rates.{kind}: several rates are given, so each must state its gmacs")
        return self

    def seconds(self, kind: WorkKind, gmacs: float | None = None) -> float:
        """Seconds of one unit on one worker, with a network of that size.

        Raises:
            RateError: if there is no rate of that kind.
        """
        if kind not in self.rates:
            raise RateError(
                f"--set plan.rates: {self.name} has no rate of {kind!r}, it has "
                f"{', '.join(sorted(self.rates))}; give rates that have one, or plan.steps without that step"
            )
        rates = self.rates[kind]
        sized = {rate.gmacs: rate.seconds for rate in rates if rate.gmacs is not None}
        if gmacs is None or not sized:
            return rates[0].seconds
        nearest = min(sized, key=lambda size: max(size / gmacs, gmacs / size))
        return sized[nearest] * gmacs / nearest


class RateError(ValueError):
    """A kind of work for which there is no rate."""
