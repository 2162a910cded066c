"""Splits a Core ML program in two, so that a phone need not hold all of its weights at once.

Works on the program's specification (a protobuf message of MIL), without its weights. Values that cross the
split become outputs of the first half and inputs of the second under their own names, in float16 as they are;
inputs of the whole go to each half that reads them.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

BALANCE_TOLERANCE = 0.05
"""How far from half of all weights a split may lie, if fewer numbers cross it there."""

_FLOAT16 = 10  # MIL's DataType.FLOAT16

Message = Any  # of protobuf, which has no types here


def split_program(specification: Message) -> tuple[Message, Message]:
    """The specifications of two programs that together compute what this one does.

    Args:
        specification: of a program with float16 weights.

    Raises:
        ValueError: if its weights are compressed, or it cannot be split.
    """
    function = specification.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operations = list(block.operations)
    if any(operation.type.startswith("constexpr_") for operation in operations):
        raise ValueError("the package's weights are compressed; split it first, then compress the halves")
    index = _split_index(operations)
    early, late = operations[: index + 1], operations[index + 1 :]
    early_inputs, late_inputs = _input_names(early), _input_names(late)
    # A constant that both halves read is copied; only computed values cross the split.
    shared = [step for step in early if _is_constant(step) and _outputs_in(late_inputs, step)]
    kept = [step for step in early if not _is_constant(step) or _outputs_in(early_inputs, step)]
    crossing = [value for step in kept if not _is_constant(step) for value in _outputs_in(late_inputs, step)]
    ports = [type(function.inputs[0])(name=value.name, type=value.type) for value in crossing]
    return (
        _half(specification, operations=kept, ports=[], outputs=[value.name for value in crossing]),
        _half(specification, operations=[*shared, *late], ports=ports, outputs=list(block.outputs)),
    )


def _split_index(operations: Sequence[Message]) -> int:
    """Index of the first half's last operation."""
    last_use = {
        name: index for index, operation in enumerate(operations) for name in _input_names([operation])
    }
    total = sum(_num_weights(operation) for operation in operations)
    before, crossing = 0, dict[str, Message]()
    candidates = []
    for index, operation in enumerate(operations[:-1]):
        before += _num_weights(operation)
        if not _is_constant(operation):
            crossing |= {value.name: value for value in operation.outputs}
        crossing = {name: value for name, value in crossing.items() if last_use.get(name, -1) > index}
        # Ports must be float16: the timestep's float32 values may not cross.
        if crossing and all(value.type.tensorType.dataType == _FLOAT16 for value in crossing.values()):
            imbalance = abs(before / max(total, 1) - 0.5)
            candidates.append((imbalance, sum(_num_elements(value) for value in crossing.values()), index))
    if not candidates:
        raise ValueError("the program is too short to be split in two")
    best = min(imbalance for imbalance, _, _ in candidates)
    balanced = (candidate for candidate in candidates if candidate[0] <= best + BALANCE_TOLERANCE)
    return min((elements, imbalance, index) for imbalance, elements, index in balanced)[2]


def _half(
    specification: Message, *, operations: Sequence[Message], ports: Sequence[Message], outputs: Sequence[str]
) -> Message:
    half = deepcopy(specification)
    function = half.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    needed = _input_names(operations)
    inputs = [*(port for port in function.inputs if port.name in needed), *ports]
    fields = ((function.inputs, inputs), (block.operations, operations), (block.outputs, outputs))
    # Repeated fields of protobuf cannot be assigned, only changed in place.
    for field, values in fields:
        del field[:]
        field.extend(values)
    return half


def _is_constant(operation: Message) -> bool:
    return operation.type == "const"


def _outputs_in(names: set[str], operation: Message) -> list[Message]:
    return [value for value in operation.outputs if value.name in names]


def _input_names(operations: Sequence[Message]) -> set[str]:
    values = [value for operation in operations for value in operation.inputs.values()]
    return {argument.name for value in values for argument in value.arguments}


def _num_weights(operation: Message) -> int:
    return _num_elements(operation.outputs[0]) if _is_constant(operation) else 0


def _num_elements(value: Message) -> int:
    return math.prod(int(dimension.constant.size) for dimension in value.type.tensorType.dimensions)
