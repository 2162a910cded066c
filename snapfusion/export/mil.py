"""Executes the operations of a Core ML program with torch, where Core ML itself cannot run.

Core ML exists on Apple's systems only. A program read back from its package is a list of plain operations
with their weights, so it can be evaluated anywhere: arithmetic in float32, every result rounded to the dtype
that the program states for it. In a float16 program overflow and rounding between operations thus show as
on a device that computes in float16; the order in which it sums within an operation is its own and does not.

A full-size UNet's weights would take gigabytes in float32, compressed ones more than they were compressed
to: each is made dense and widened when an operation reads it, and let go after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snapfusion.export.operations import rule_of
from snapfusion.export.parity import ParityError

FLOAT16_MAX = 65504.0
"""The largest float16."""

COMPRESSED_PREFIX = "constexpr_"
"""How the kinds of operations begin that make a dense weight of a compressed one."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """What an operation gives, or a program takes: its name, its fixed shape, its dtype as NumPy says it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of a program.

    Attributes:
        kind: what it does, for example "conv".
        inputs: the name of the value behind each argument, or the names where an argument is a list.
        outputs: its results; most kinds have one.
    """

    kind: str
    inputs: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        """That of the first result."""
        return self.outputs[0].name

    def reads(self) -> set[str]:
        """The names of all values that it reads."""
        return {name for names in self.inputs.values() for name in _as_tuple(names)}


@dataclass(frozen=True, kw_only=True)
class MilProgram:
    """A program as data: its constants by name, and its operations in the order they run."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, Any]
    operations: tuple[Operation, ...]

    def weights(self) -> dict[str, np.ndarray]:
        """The constants that hold learnt numbers: floating-point arrays of more than one element."""
        arrays = {name: value for name, value in self.constants.items() if isinstance(value, np.ndarray)}
        return {name: array for name, array in arrays.items() if array.dtype.kind == "f" and array.size > 1}

    def results(self) -> list[Value]:
        """What its operations give, in their order."""
        return [value for operation in self.operations for value in operation.outputs]

    def before(self, kinds: Iterable[str]) -> set[str]:
        """The names of all values that operations of these kinds are computed from."""
        wanted, found = set(kinds), set[str]()
        for operation in reversed(self.operations):
            if operation.kind in wanted or found.intersection(value.name for value in operation.outputs):
                found |= operation.reads()
        return found


Observer = Callable[[Operation, Value, Tensor], None]
"""Told each floating-point result, rounded, with what it is a result of."""


def evaluate(
    program: MilProgram, inputs: Sequence[np.ndarray], *, observe: Observer | None = None
) -> np.ndarray:
    """The first output, float32, for one set of inputs; see `evaluate_chain`."""
    return evaluate_chain([program], inputs, observe=observe)


def evaluate_chain(
    programs: Sequence[MilProgram], inputs: Sequence[np.ndarray], *, observe: Observer | None = None
) -> np.ndarray:
    """The first output of the last program, float32.

    Args:
        programs: the chunks of a program, in their order; each takes by name what it shares with the whole,
            and what those before it give.
        inputs: those of the whole, in the order in which the chunks come to take them; floating point, for
            token ids whole numbers.
        observe: is told every floating-point result.

    Raises:
        ValueError: if a shape differs, or an input for whole numbers is floating point.
        UnknownOperationError: if a program holds an operation not defined here.
    """
    ports = _ports(programs)
    given = [array.shape for array in inputs]
    accepted = [port.shape for port in ports]
    if given != accepted:
        raise ValueError(f"inputs of shapes {given} given; {accepted} is accepted: shapes are fixed")
    values = {port.name: _as_input(port, array) for port, array in zip(ports, inputs, strict=True)}
    for program in programs:
        values |= _run(program, values, observe=observe)
    return values[programs[-1].outputs[0].name].numpy()


def _ports(programs: Sequence[MilProgram]) -> list[Value]:
    """What a chain of programs takes and none of them gives."""
    made = {port.name for program in programs for port in program.outputs}
    ports = {port.name: port for program in programs for port in program.inputs}
    return [port for name, port in ports.items() if name not in made]


def _as_input(port: Value, array: np.ndarray) -> Tensor:
    """An input as the program takes it."""
    if not port.dtype.startswith("float") and array.dtype.kind == "f":
        raise ValueError(f"{port.name} given as {array.dtype}; it takes whole numbers, as {port.dtype}")
    return _round_to(torch.from_numpy(array), dtype=port.dtype)


@torch.inference_mode()
def _run(program: MilProgram, inputs: Mapping[str, Tensor], *, observe: Observer | None) -> dict[str, Tensor]:
    """All outputs by name."""
    values = {port.name: inputs[port.name] for port in program.inputs}
    dense = {step.name: step for step in program.operations if step.kind.startswith(COMPRESSED_PREFIX)}

    def read(name: str) -> Any:  # noqa: ANN401 - a number, a string or a tensor
        if name in values:
            return values[name]
        if name in dense:
            return _result(dense[name], read)[0]
        return _operand(program.constants[name])

    for operation, done in zip(program.operations, _last_uses(program), strict=True):
        if operation.name in dense:
            continue
        results = _result(operation, read)
        for value, result in zip(operation.outputs, results, strict=True):
            values[value.name] = result
            if observe and result.is_floating_point():
                observe(operation, value, result)
        for name in done:
            values.pop(name, None)
    return {port.name: values[port.name] for port in program.outputs}


def _result(operation: Operation, read: Callable[[str], Any]) -> tuple[Tensor, ...]:
    """Its results, each rounded to its dtype."""
    arguments = {
        argument: read(names) if isinstance(names, str) else [read(name) for name in names]
        for argument, names in operation.inputs.items()
    }
    results = rule_of(operation.kind)(arguments)
    several = results if isinstance(results, tuple) else (results,)
    stated = zip(several, operation.outputs, strict=True)
    return tuple(_round_to(result, dtype=value.dtype) for result, value in stated)


def _last_uses(program: MilProgram) -> list[set[str]]:
    """For each operation the values that none after it reads; a decoder's together would fill gigabytes."""
    needed = {port.name for port in program.outputs}
    last_uses = []
    for operation in reversed(program.operations):
        # A result that nobody reads is let go at once.
        touched = operation.reads() | {value.name for value in operation.outputs}
        last_uses.append(touched - needed)
        needed |= touched
    return last_uses[::-1]


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _operand(value: Any) -> Any:  # noqa: ANN401 - a number, a string or an array
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float32))
    # Packed indices and quantized weights; a shape or a list of axes is int32.
    if isinstance(value, np.ndarray) and value.dtype.itemsize == 1 and value.dtype.kind in "iu":
        return torch.from_numpy(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _round_to(result: Tensor, *, dtype: str) -> Tensor:
    """To the dtype's values; floating point is carried in float32, whole numbers in int64."""
    if dtype == "float16":
        return result.half().float()
    if dtype == "uint16":
        return result.long() & 0xFFFF
    kept: torch.dtype = getattr(torch, dtype)
    narrow = result.to(kept)
    return narrow if dtype in ("float32", "bool") else narrow.long()


@dataclass(frozen=True, kw_only=True)
class MaxAbs:
    """The result of largest magnitude among several.

    Attributes:
        value: max |x|.
        operation: the name of what gave it.
        kind: of that operation.
    """

    value: float
    operation: str
    kind: str

    @property
    def headroom(self) -> float | None:
        """How many times larger it might be before float16 ends; None for 0."""
        return FLOAT16_MAX / self.value if self.value else None


class MaxAbsObserver:
    """An observer: how near a program's float16 results come to the end of float16, over all samples.

    Told of a result that is not finite it raises a `ParityError` that says where.

    Attributes:
        kinds: for each kind of operation the largest result.
        logit: the largest of the products whose softmax is taken: attention's, where overflow is most to be
            expected. None without attention. What a mask adds to them is left out throughout.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, MaxAbs] = {}
        self.logit: MaxAbs | None = None
        # Products that no softmax has read so far, by the names under which it may.
        self._products: dict[str, MaxAbs] = {}
        self._first: str | None = None
        self._sample = -1

    def __call__(self, operation: Operation, value: Value, result: Tensor) -> None:
        """One more result."""
        self._first = self._first or value.name
        if value.name == self._first:
            self._sample += 1
            self._products.clear()
        largest = float(result.abs().max())
        if not math.isfinite(largest):
            raise ParityError(self._refusal(operation, value=value, result=result))
        if value.dtype != "float16":
            return
        found = MaxAbs(value=largest, operation=value.name, kind=operation.kind)
        products = [self._products[name] for name in operation.reads() if name in self._products]
        if operation.kind == "matmul":
            self._products[value.name] = found
        elif operation.kind == "softmax":
            self.logit = max([*products, self.logit or products[0]], key=_size) if products else self.logit
        elif operation.kind == "add" and products:
            self._products[value.name] = products[0]
            return
        self.kinds[operation.kind] = max(found, self.kinds.get(operation.kind, found), key=_size)

    @property
    def largest(self) -> MaxAbs | None:
        """The largest of all; None before there was a float16 result."""
        return max(self.kinds.values(), key=_size, default=None)

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        told = {"largest": self.largest, "attention_logit": self.logit}
        return {
            "float16_end": FLOAT16_MAX,
            **{name: asdict(found) | {"headroom": found.headroom} for name, found in told.items() if found},
            "largest_by_kind": {kind: found.value for kind, found in sorted(self.kinds.items())},
        }

    def _refusal(self, operation: Operation, *, value: Value, result: Tensor) -> str:
        bad = int((~result.isfinite()).sum())
        return (
            f"operation {value.name} ({operation.kind}) gives {bad} values that are not finite on sample "
            f"{self._sample}: {value.dtype} ends at {torch.finfo(getattr(torch, value.dtype)).max:.6g}"
        )


def _size(extreme: MaxAbs) -> float:
    return extreme.value
