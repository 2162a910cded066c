"""Prices of nodes and storage, from a list that the user gives: this repository knows no prices."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jobs.planning.builtin_lists import NamedList
from jobs.planning.settings import Market
from pipelines.costs.requests import Requests
from snapfusion.settings import Settings


class NodeType(Settings):
    """A type of node.

    Attributes:
        accelerator: name of its accelerators; empty without any.
        accelerators: number of them.
        cores: of its CPUs.
        memory_gib: of one accelerator; of the whole node without any.
        on_demand: price of an hour.
        spot: the same on the spot market; null if there is none.
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
    """Prices of an object store.

    Attributes:
        gb_month: 10^9 bytes stored for a month.
        put_1000: a thousand PUT, POST or LIST requests.
        get_1000: a thousand GET or HEAD requests.
    """

    gb_month: NonNegativeFloat
    put_1000: NonNegativeFloat
    get_1000: NonNegativeFloat

    def request_cost(self, requests: Requests) -> float:
        """Price of requests."""
        return ((requests.put + requests.list) * self.put_1000 + requests.get * self.get_1000) / 1000.0


class PriceList(NamedList):
    """Prices of one provider on one day.

    Attributes:
        date: on which they were valid, according to the list's author.
        currency: of all of them.
        nodes: by name.
        storage: of the object store.
    """

    kind = "prices"
    date: str = Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    currency: str = "USD"
    nodes: dict[str, NodeType]
    storage: StoragePrices
