"""How long one worker takes for one unit of work: measured by a probe, or given."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from jobs.planning.builtin_lists import read_list
from snapfusion.settings import Settings

WorkKind = Literal[
    "render",
    "read",
    "write",
    "write_image",
    "encode",
    "pass",
    "decode",
    "judge",
    "train",
    "train_decoder",
    "update",
    "compile",
]
"""The unit of each kind of work.

render         a scene drawn and put into a shard, on a core
read           a row of a shard streamed, selected and decoded, on a core
write          a row packed and written, on a core
write_image    a picture made a PNG, on a core
encode         a picture through the VAE's encoder
pass           a latent through the UNet, without gradients; a guided step is two
decode         a latent through the VAE's decoder
judge          a picture through the judges of an evaluation
train          a latent through the UNet, forward and backward
train_decoder  a latent through the half-width decoder, forward and backward
update         10^6 parameters moved by the optimizer and averaged, once a step
compile        a mobile bundle
"""


class Rate(Settings):
    """What was measured of a kind of work.

    Attributes:
        seconds: of one unit on one worker.
        gmacs: 10^9 multiply-accumulates of the network in one unit's forward pass; another network's time is
            in proportion. Null where no network is asked.
    """

    seconds: PositiveFloat
    gmacs: PositiveFloat | None = None


class StartupSeconds(Settings):
    """Seconds that pass before work begins, and after it ends.

    Attributes:
        ray: a cluster of one's own, once a process.
        job: the actors of a data job and their networks.
        training: the workers of a training, and what is loaded and saved round it.
    """

    ray: NonNegativeFloat = 0.0
    job: NonNegativeFloat = 0.0
    training: NonNegativeFloat = 0.0


class Contention(Settings):
    """How many times longer work takes where every core of a machine without accelerators is at it.

    Attributes:
        tables: a unit of a table.
        trainings: a step of a training, waiting for the other workers included.
    """

    tables: Annotated[float, Field(ge=1.0)] = 1.0
    trainings: Annotated[float, Field(ge=1.0)] = 1.0


class Rates(Settings):
    """All that a forecast knows of a machine.

    Attributes:
        name: by which every time is told.
        worker: what one worker is, as in "an A100" or "a thread of ...".
        date: on which they were measured or collected.
        about: where they are from, in a line.
        rates: by kind; of several the one whose network is nearest in size is taken.
        checkpointed: whether `train` was measured with activations computed again for the backward pass; if
            not, a training that does so takes one more pass a row.
        crowding: what work takes longer where all cores are full.
        starts: what passes before and after the work.
        png_share: bytes of a picture as PNG, of those of its pixels.
    """

    name: str
    worker: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    about: str
    rates: dict[WorkKind, Annotated[tuple[Rate, ...], Field(min_length=1)]]
    checkpointed: bool = False
    crowding: Contention = Contention()
    starts: StartupSeconds = StartupSeconds()
    png_share: Annotated[float, Field(gt=0.0, le=1.1)] = 0.6

    @model_validator(mode="after")
    def _sizes_are_told_apart(self) -> Rates:
        for kind, found in self.rates.items():
            if len(found) > 1 and any(rate.gmacs is None for rate in found):
                raise ValueError(f"rates.{kind}: of several rates each states its network's gmacs")
        return self

    def seconds(self, kind: WorkKind, gmacs: float | None = None) -> float:
        """Of one unit on one worker, by a network of that size.

        Raises:
            RateError: if there is no rate of that kind.
        """
        if kind not in self.rates:
            raise RateError(
                f"--set plan.rates: {self.name} has no rate of {kind!r}, it has "
                f"{', '.join(sorted(self.rates))}; give one that has, or leave the step out (plan.steps)"
            )
        found = self.rates[kind]
        if gmacs is None:
            return found[0].seconds
        sized = {rate.gmacs: rate.seconds for rate in found if rate.gmacs is not None}
        if not sized:
            return found[0].seconds
        nearest = min(sized, key=lambda size: max(size / gmacs, gmacs / size))
        return sized[nearest] * gmacs / nearest


class RateError(ValueError):
    """A kind of work of which the rates say nothing."""


def given_rates(name: str) -> Rates:
    """Rates that are shipped, by name, or the user's own, by path or URL.

    Raises:
        SettingsError: if there are none, or they are no rates; says which.
    """
    return read_list(Rates, name, kind="rates")
