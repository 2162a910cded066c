"""Reads rates and prices from JSON lists: built-in ones by name, the user's by path or URL.

Rates are seconds that one worker takes for one unit of work, measured by a probe or given. This repository
knows no prices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from jobs.planning.settings import Market
from pipelines.costs.requests import Requests
from pipelines.costs.stage import Work, WorkKind
from pipelines.storage.objects import StorageError, read_bytes
from snapfusion.records import parse_record
from snapfusion.settings import Settings, SettingsError

_FOLDER = Path(__file__).parent / "lists"


class NamedList(Settings):
    """A list of rates or prices: its name, and the origin of its numbers in a line.

    `kind` is the folder of the built-in lists, and the setting of the planner that names one.
    """

    kind: ClassVar[Literal["prices", "rates"]]
    name: str
    about: str

    @classmethod
    def builtin_names(cls) -> list[str]:
        """Names of the built-in lists."""
        return sorted(path.stem for path in (_FOLDER / cls.kind).glob("*.json"))

    @classmethod
    def read(cls, name: str) -> Self:
        """The built-in list of that name, or the one at that path or URL.

        Raises:
            SettingsError: if there is no such file, or it is not of that kind.
        """
        option, builtin = f"--set plan.{cls.kind}={name}", cls.builtin_names()
        try:
            content = read_bytes(str(_FOLDER / cls.kind / f"{name}.json") if name in builtin else name)
        except StorageError:
            raise SettingsError(
                f"{option}: there is no such file; a path, a URL or {', '.join(builtin)} are accepted"
            ) from None
        try:
            return cls.parse(parse_record(content, name=name))
        except ValueError as error:
            raise SettingsError(f"{option}: it holds no {cls.kind} ({error})") from None


class Rate(Settings):
    """Seconds of one unit of a kind of work, on one worker.

    `gmacs` are the 10^9 multiply-accumulates of the network's forward pass, or of the matrices, in one unit,
    null without them; the time of another size is in proportion.
    """

    seconds: PositiveFloat
    gmacs: PositiveFloat | None = None


class StartupSeconds(Settings):
    """Fixed seconds around work: of a local Ray once a process, a data job's actors, a training's workers."""

    ray: NonNegativeFloat = 0.0
    job: NonNegativeFloat = 0.0
    training: NonNegativeFloat = 0.0


class Contention(Settings):
    """Factors on the time of a table's unit, and of a training step, if workers occupy every CPU core."""

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
        driver_mib: memory of a driver after a data job and a training of the miniature: libraries and Ray.
    """

    kind = "rates"
    worker: str
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    rates: dict[WorkKind, Annotated[tuple[Rate, ...], Field(min_length=1)]]
    checkpointed: bool = False
    crowding: Contention = Contention()
    starts: StartupSeconds = StartupSeconds()
    png_share: Annotated[float, Field(gt=0.0, le=1.1)] = 0.6
    driver_mib: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _several_rates_state_their_size(self) -> Rates:
        for kind, rates in self.rates.items():
            if len(rates) > 1 and any(rate.gmacs is None for rate in rates):
                raise ValueError(f"rates.{kind}: several rates are given, so each must state its gmacs")
        return self

    def seconds(self, work: Work) -> float:
        """Seconds that one worker takes for all units of a work.

        Raises:
            SettingsError: if there is no rate of its kind.
        """
        if work.kind not in self.rates:
            raise SettingsError(
                f"--set plan.rates: {self.name} has no rate of {work.kind!r}, it has "
                f"{', '.join(sorted(self.rates))}; give rates that have one, or plan.steps without that step"
            )
        rates, gmacs = self.rates[work.kind], work.gmacs
        sized = {rate.gmacs: rate.seconds for rate in rates if rate.gmacs is not None}
        if gmacs is None or not sized:
            return work.units * rates[0].seconds
        nearest = min(sized, key=lambda size: max(size / gmacs, gmacs / size))
        return work.units * (sized[nearest] * gmacs / nearest)


class NodeType(Settings):
    """A type of node: name and number of its accelerators, if any, CPU cores, memory, and prices of an hour.

    `memory_gib` is of one accelerator, or of the whole node without any; `spot` is null without a market.
    """

    accelerator: str = ""
    accelerators: NonNegativeInt = 0
    cores: PositiveInt
    memory_gib: PositiveFloat
    on_demand: NonNegativeFloat
    spot: NonNegativeFloat | None = None

    def price(self, market: Market) -> float:
        """Price of an hour; on demand if there is no spot market."""
        return self.spot if market == "spot" and self.spot is not None else self.on_demand


class StoragePrices(Settings):
    """Prices of 10^9 bytes stored for a month, and of 1,000 PUT, POST or LIST, and GET or HEAD requests."""

    gb_month: NonNegativeFloat
    put_1000: NonNegativeFloat
    get_1000: NonNegativeFloat

    def request_cost(self, requests: Requests) -> float:
        """Price of requests."""
        return ((requests.put + requests.list) * self.put_1000 + requests.get * self.get_1000) / 1000.0


class PriceList(NamedList):
    """Prices of one provider on the day on which they were valid, according to the list's author."""

    kind = "prices"
    date: str = Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    currency: str = "USD"
    nodes: dict[str, NodeType]
    storage: StoragePrices
