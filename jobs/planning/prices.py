"""What nodes and storage cost, by a list that the user gives: this repository knows no prices."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jobs.planning.builtin_lists import read_list
from jobs.planning.settings import Market
from snapfusion.settings import Settings


class NodeType(Settings):
    """A kind of node.

    Attributes:
        accelerator: what its accelerators are; empty where it has none.
        accelerators: how many.
        cores: of its CPUs.
        memory_gib: of one accelerator; of the whole node where it has none.
        on_demand: price of an hour.
        spot: the same on the spot market; null where there is none.
    """

    accelerator: str = ""
    accelerators: NonNegativeInt = 0
    cores: PositiveInt
    memory_gib: PositiveFloat
    on_demand: NonNegativeFloat
    spot: NonNegativeFloat | None = None

    def price(self, market: Market) -> float:
        """Of an hour; on demand where there is no spot market."""
        return self.spot if market == "spot" and self.spot is not None else self.on_demand


class StoragePrices(Settings):
    """Of an object store.

    Attributes:
        gb_month: 10^9 bytes kept for a month.
        put_1000: a thousand PUT, POST or LIST requests.
        get_1000: a thousand GET or HEAD requests.
    """

    gb_month: NonNegativeFloat
    put_1000: NonNegativeFloat
    get_1000: NonNegativeFloat


class PriceList(Settings):
    """Prices of one provider on one day.

    Attributes:
        name: by which every cost is told.
        date: on which they held, as the list's author says.
        about: where they are from, in a line.
        currency: of all of them.
        nodes: by name.
        storage: of the object store.
    """

    name: str
    date: str = Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")
    about: str
    currency: str = "USD"
    nodes: dict[str, NodeType]
    storage: StoragePrices


def price_list(name: str) -> PriceList:
    """A list that is shipped, by name, or the user's own, by path or URL.

    Raises:
        SettingsError: if there is none, or it is no price list; says which.
    """
    return read_list(PriceList, name, kind="prices")
