"""Evaluates Core ML programs with torch on machines where Core ML itself cannot run.

Core ML exists on Apple's systems only. A program read back from its package is a list of plain operations
with their weights, so it can be evaluated anywhere: arithmetic in float32, every result rounded to the dtype
that the program states for it. In a float16 program, overflow and rounding between operations thus appear as
on a device that computes in float16; the order of summation within an operation is not reproduced.

A full-size UNet's weights would take gigabytes in float32, and compressed ones more than their compressed
size: each is decompressed and widened when an operation reads it, and released afterwards.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from snapfusion.export.modules import check_shapes
from snapfusion.export.operations import rule_of
from snapfusion.export.parity import ParityError

FLOAT16_MAX = 65504.0
"""The largest float16."""

COMPRESSED_PREFIX = "constexpr_"
"""Prefix of the kinds of operations that decompress a weight."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Value:
    """A result of an operation or an input of a program: its name, fixed shape, and dtype as in NumPy."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float16"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a program.

    Attributes:
        kind: of operation, for example "conv".
        inputs: the name of the value of each argument, or the names where an argument is a list.
        outputs: its results; most kinds have one.
    """

    kind: str
    inputs: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        """Name of the first result."""
        return self.outputs[0].name

    def reads(self) -> set[str]:
        """The names of all values that it reads."""
        return {name for names in self.inputs.values() for name in _as_tuple(names)}


@dataclass(frozen=True, kw_only=True)
class MilProgram:
    """A program as data: its constants by name, and its operations in execution order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, Any]
    operations: tuple[Operation, ...]

    def weights(self) -> dict[str, np.ndarray]:
        """The constants that are weights: floating-point arrays of more than one element."""
        arrays = {name: value for name, value in self.constants.items() if isinstance(value, np.ndarray)}
        return {name: array for name, array in arrays.items() if array.dtype.kind == "f" and array.size > 1}

    def results(self) -> list[Value]:
        """The results of all operations, in their order."""
        return [value for operation in self.operations for value in operation.outputs]

    def before(self, kinds: Iterable[str]) -> set[str]:
        """The names of all values that operations of these kinds are computed from."""
        kinds, names = set(kinds), set[str]()
        for operation in reversed(self.operations):
            if operation.kind in kinds or names.intersection(value.name for value in operation.outputs):
                names |= operation.reads()
        return names


Observer = Callable[[Operation, Value, Tensor], None]
"""Called with each rounded floating-point result and the operation that computed it."""


def evaluate(
    programs: MilProgram | Sequence[MilProgram],
    inputs: Sequence[np.ndarray],
    *,
    observe: Observer | None = None,
) -> np.ndarray:
    """The first output of a program, or of the last program of a chain, float32.

    Args:
        programs: one, or the parts of one in their order; each takes by name the inputs that it shares with
            the whole, and the outputs of those before it.
        inputs: of the whole, in the order in which the parts first read them; floating point, or integers for
            token ids.
        observe: called with every floating-point result.

    Raises:
        ValueError: if a shape differs, or an integer input is floating point.
        UnknownOperationError: if a program has an operation that is not implemented here.
    """
    chain = [programs] if isinstance(programs, MilProgram) else programs
    computed = {port.name for program in chain for port in program.outputs}
    by_name = {port.name: port for program in chain for port in program.inputs}
    ports = [port for name, port in by_name.items() if name not in computed]
    check_shapes(inputs, accepted=[port.shape for port in ports])
    values = {port.name: _as_input(port, array) for port, array in zip(ports, inputs, strict=True)}
    for program in chain:
        values |= _run(program, values, observe=observe)
    return values[chain[-1].outputs[0].name].numpy()


def _as_input(port: Value, array: np.ndarray) -> Tensor:
    if not port.dtype.startswith("float") and array.dtype.kind == "f":
        raise ValueError(f"{port.name} is given as {array.dtype}; integers ({port.dtype}) are accepted")
    return _round_to(port.dtype, torch.from_numpy(array))


@torch.inference_mode()
def _run(program: MilProgram, inputs: Mapping[str, Tensor], *, observe: Observer | None) -> dict[str, Tensor]:
    """All outputs by name."""
    values = {port.name: inputs[port.name] for port in program.inputs}
    compressed = {step.name: step for step in program.operations if step.kind.startswith(COMPRESSED_PREFIX)}

    def read(name: str) -> Any:  # noqa: ANN401 - a number, a string or a tensor
        if name in values:
            return values[name]
        if name in compressed:
            return _results(compressed[name], read)[0]
        return _operand(program.constants[name])

    for operation, released in zip(program.operations, _last_uses(program), strict=True):
        # A decompressed weight is never kept: `read` computes it again for each reader.
        if operation.name in compressed:
            continue
        for value, result in zip(operation.outputs, _results(operation, read), strict=True):
            values[value.name] = result
            if observe and result.is_floating_point():
                observe(operation, value, result)
        for name in released:
            values.pop(name, None)
    return {port.name: values[port.name] for port in program.outputs}


def _results(operation: Operation, read: Callable[[str], Any]) -> list[Tensor]:
    """The operation's results, each rounded to its dtype."""
    arguments = {
        argument: read(names) if isinstance(names, str) else [read(name) for name in names]
        for argument, names in operation.inputs.items()
    }
    results = _as_tuple(rule_of(operation.kind)(arguments))
    return [_round_to(value.dtype, result) for result, value in zip(results, operation.outputs, strict=True)]


def _last_uses(program: MilProgram) -> list[set[str]]:
    """For each operation the values that no later one reads: a decoder's together would take gigabytes."""
    needed = {port.name for port in program.outputs}
    last_uses = []
    for operation in reversed(program.operations):
        # Results are included, so that one that is never read is released at once.
        touched = operation.reads() | {value.name for value in operation.outputs}
        last_uses.append(touched - needed)
        needed |= touched
    return last_uses[::-1]


def _as_tuple(value: _T | tuple[_T, ...]) -> tuple[_T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _operand(value: Any) -> Any:  # noqa: ANN401 - a number, a string or an array
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float32))
    # Packed indices and quantized weights have 8 bits; a shape or a list of axes is int32.
    if isinstance(value, np.ndarray) and value.dtype.itemsize == 1 and value.dtype.kind in "iu":
        return torch.from_numpy(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _round_to(dtype: str, result: Tensor) -> Tensor:
    """Round to the dtype's values; floating point is carried in float32, integers in int64."""
    if dtype == "float16":
        return result.half().float()
    if dtype == "uint16":
        return result.long() & 0xFFFF
    narrow = result.to(getattr(torch, dtype))
    return narrow if dtype in ("float32", "bool") else narrow.long()


@dataclass(frozen=True, kw_only=True)
class MaxAbs:
    """The result of largest magnitude among several.

    Attributes:
        value: max |x|.
        operation: name of the operation that computed it.
        kind: of that operation.
    """

    value: float
    operation: str
    kind: str

    @property
    def headroom(self) -> float | None:
        """The factor by which it may grow before float16 overflows; None for 0."""
        return FLOAT16_MAX / self.value if self.value else None


class MaxAbsObserver:
    """Records over all samples how close a program's float16 results come to overflow.

    Raises a `ParityError` that names the operation and the sample for a result that is not finite.

    Attributes:
        by_kind: the largest result of each kind of operation.
        logit: the largest attention logit, where overflow is most likely: a product whose softmax is
            computed. None without attention. Values that a mask adds to logits are ignored throughout.
    """

    def __init__(self) -> None:
        self.by_kind: dict[str, MaxAbs] = {}
        self.logit: MaxAbs | None = None
        # Products that no softmax has read so far, by the names under which it may read them.
        self._products: dict[str, MaxAbs] = {}
        self._first: str | None = None
        self._sample = -1

    def __call__(self, operation: Operation, value: Value, result: Tensor) -> None:
        """Record one more result."""
        # The program's first result marks the beginning of the next sample.
        self._first = self._first or value.name
        if value.name == self._first:
            self._sample += 1
            self._products.clear()
        magnitude = float(result.abs().max())
        if not math.isfinite(magnitude):
            num_bad = int((~result.isfinite()).sum())
            limit = torch.finfo(getattr(torch, value.dtype)).max
            raise ParityError(
                f"operation {value.name} ({operation.kind}) gives {num_bad} values that are not finite on "
                f"sample {self._sample}: {value.dtype} ends at {limit:.6g}"
            )
        if value.dtype != "float16":
            return
        current = MaxAbs(value=magnitude, operation=value.name, kind=operation.kind)
        products = [self._products[name] for name in operation.reads() if name in self._products]
        if operation.kind == "matmul":
            self._products[value.name] = current
        elif operation.kind == "softmax" and products:
            self.logit = max([*products, self.logit or products[0]], key=_magnitude)
        elif operation.kind == "add" and products:
            # A mask is added: the softmax will read this name, but the logit is the product without the mask.
            self._products[value.name] = products[0]
            return
        self.by_kind[operation.kind] = max(current, self.by_kind.get(operation.kind, current), key=_magnitude)

    @property
    def largest(self) -> MaxAbs | None:
        """The largest of all; None before the first float16 result."""
        return max(self.by_kind.values(), key=_magnitude, default=None)

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        named = {"largest": self.largest, "attention_logit": self.logit}
        return {
            "float16_end": FLOAT16_MAX,
            **{name: asdict(each) | {"headroom": each.headroom} for name, each in named.items() if each},
            "largest_by_kind": {kind: each.value for kind, each in sorted(self.by_kind.items())},
        }


_magnitude = attrgetter("value")
