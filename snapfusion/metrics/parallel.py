"""Work on all cores, with one thread of linear algebra each.

Several threads for one matrix wait for each other where cores are shared, and do so busily.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Map(Protocol):
    """Like `map`: the results of a function of one argument, in order of the items."""

    def __call__(self, function: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
        """Compute all results."""


@contextmanager
def over_cores() -> Iterator[Map]:
    """A map over as many threads as torch has (torch releases Python's lock while it computes).

    Within the context torch computes each operation in one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
