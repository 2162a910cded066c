"""Finds trainable weights that an objective carries and the training neither updates nor saves.

A run that was killed and resumed would silently begin anew with such weights.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LEAVES = (type, ModuleType, str, bytes, bool, int, float, complex, type(None))


def trainable_outside(objective: object, *, networks: Iterable[nn.Module]) -> str | None:
    """Find an optimizer, or a weight that requires a gradient and is none of `networks`.

    Attributes, containers, closures and arguments of partial functions are searched, and the parameters of
    every network.

    Returns:
        Where the first one is, as in "DmdObjective.critic.weight"; None if there is none.
    """
    inside = {id(parameter) for network in networks for parameter in network.parameters()}
    seen = dict[int, object]()  # holds what it has seen, so that no identity is used twice
    pending: list[tuple[str, object]] = [(type(objective).__name__, objective)]
    while pending:
        path, value = pending.pop()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen[id(value)] = value
        if isinstance(value, torch.optim.Optimizer):
            return path
        for name, tensor in _weights(value):
            if tensor.requires_grad and id(tensor) not in inside:
                return f"{path}.{name}" if name else path
        if not isinstance(value, nn.Module | Tensor):
            pending += [(f"{path}.{name}", part) for name, part in _parts(value)]
    return None


def _weights(value: object) -> Iterator[tuple[str, Tensor]]:
    """The weights that a network or a tensor is."""
    if isinstance(value, nn.Module):
        yield from value.named_parameters()
    elif isinstance(value, Tensor) and value.is_leaf:
        yield "", value


def _parts(value: Any) -> Iterator[tuple[str, object]]:  # noqa: ANN401 - any object
    """The objects that an object refers to, by name."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue  # a variable that has no value yet
        yield "__defaults__", value.__defaults__
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    yield from getattr(value, "__dict__", {}).items()
    for slot in getattr(type(value), "__slots__", ()):
        if hasattr(value, slot):
            yield slot, getattr(value, slot)
