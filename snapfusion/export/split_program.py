"""Where a Core ML program is cut in two, so that a phone need not hold all of its weights at once.

Works on the program as its specification states it (a protobuf message of MIL), without its weights. The
values that cross the cut become outputs of the first half and inputs of the second under their own names, in
float16 as they are; inputs of the whole go to each half that reads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

BALANCE_TOLERANCE = 0.05
"""Of all weights: how far from the middle a cut may lie if fewer numbers cross it there."""

_FLOAT16 = 10  # MIL's DataType.FLOAT16

Message = Any  # of protobuf, which has no types here


def split_program(specification: Message) -> tuple[Message, Message]:
    """The specifications of two programs that together compute what this one does.

    Args:
        specification: of a program with float16 weights.

    Raises:
        ValueError: if its weights are compressed, or it cannot be cut.
    """
    function = specification.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operations = list(block.operations)
    if any(operation.type.startswith("constexpr_") for operation in operations):
        raise ValueError("the package's weights are compressed; cut it in two first, and compress the halves")
    place = _split_index(operations)
    early, late = operations[: place + 1], operations[place + 1 :]
    early_reads, late_reads = _input_names(early), _input_names(late)
    shared = [
        operation for operation in early if _is_constant(operation) and _outputs_in(operation, late_reads)
    ]
    kept = [
        operation for operation in early if not _is_constant(operation) or _outputs_in(operation, early_reads)
    ]
    crossing = [value for step in kept if not _is_constant(step) for value in _outputs_in(step, late_reads)]
    # A port is a name with a type, as the function's own are.
    made = [type(function.inputs[0])(name=value.name, type=value.type) for value in crossing]
    return (
        _half(specification, operations=kept, ports=[], outputs=[value.name for value in crossing]),
        _half(specification, operations=[*shared, *late], ports=made, outputs=list(block.outputs)),
    )


def _split_index(operations: Sequence[Message]) -> int:
    """The last operation of the first half."""
    last_use = {
        name: place for place, operation in enumerate(operations) for name in _input_names([operation])
    }
    total = sum(_num_weights(operation) for operation in operations)
    before, crossing = 0, dict[str, Message]()
    candidates = []
    for place, operation in enumerate(operations[:-1]):
        before += _num_weights(operation)
        if not _is_constant(operation):
            crossing |= {value.name: value for value in operation.outputs}
        crossing = {name: value for name, value in crossing.items() if last_use.get(name, -1) > place}
        if crossing and all(_dtype(value) == _FLOAT16 for value in crossing.values()):
            off = abs(before / max(total, 1) - 0.5)
            candidates.append((off, sum(_num_elements(value) for value in crossing.values()), place))
    if not candidates:
        raise ValueError("the program is too short to be cut in two")
    nearest = min(off for off, _, _ in candidates)
    return min(
        (numbers, off, place) for off, numbers, place in candidates if off <= nearest + BALANCE_TOLERANCE
    )[2]


def _half(
    specification: Message, *, operations: Sequence[Message], ports: Sequence[Message], outputs: Sequence[str]
) -> Message:
    made = deepcopy(specification)
    function = made.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    needed = _input_names(operations)
    inputs = [*(port for port in function.inputs if port.name in needed), *ports]
    for field, wanted in (
        (function.inputs, inputs),
        (block.operations, operations),
        (block.outputs, outputs),
    ):
        del field[:]
        field.extend(wanted)
    return made


def _is_constant(operation: Message) -> bool:
    return operation.type == "const"


def _outputs_in(operation: Message, names: set[str]) -> list[Message]:
    """Its results that have one of these names."""
    return [value for value in operation.outputs if value.name in names]


def _input_names(operations: Sequence[Message]) -> set[str]:
    return {
        argument.name
        for operation in operations
        for given in operation.inputs.values()
        for argument in given.arguments
    }


def _num_weights(operation: Message) -> int:
    """How many numbers a constant holds."""
    return _num_elements(operation.outputs[0]) if _is_constant(operation) else 0


def _num_elements(value: Message) -> int:
    return math.prod(int(dimension.constant.size) for dimension in value.type.tensorType.dimensions)


def _dtype(value: Message) -> int:
    return int(value.type.tensorType.dataType)
