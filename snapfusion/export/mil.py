"""Executes the operations of a Core ML program with torch, where Core ML itself cannot run.

Core ML exists on Apple's systems only. A program read back from its package is a list of plain operations
with their weights, so it can be evaluated anywhere: arithmetic in float32, every result rounded to the dtype
that the program states for it. In a float16 program overflow and rounding between operations thus show as
on a device that computes in float16; the order in which it sums within an operation is its own and does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from snapfusion.export.modules import Port, check_inputs


class UnknownOperationError(ValueError):
    """An operation that this file does not define."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One step of a program.

    Attributes:
        kind: what it does, for example "conv".
        inputs: the name of the value behind each argument.
        output: the name of its result.
        dtype: of its result, as NumPy says it.
    """

    kind: str
    inputs: Mapping[str, str]
    output: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program as data: its constants by name, and its operations in the order they run."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, Any]
    operations: tuple[Operation, ...]

    def weights(self) -> dict[str, np.ndarray]:
        """The constants that hold learnt numbers: floating-point arrays of more than one element."""
        arrays = {name: value for name, value in self.constants.items() if isinstance(value, np.ndarray)}
        return {name: array for name, array in arrays.items() if array.dtype.kind == "f" and array.size > 1}


@torch.inference_mode()
def evaluate(program: Program, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The first output, float32, for inputs of the program's shapes.

    Raises:
        ValueError: if a shape differs.
        UnknownOperationError: if the program holds an operation not defined here.
    """
    check_inputs(inputs, ports=program.inputs)
    values: dict[str, Any] = {name: _operand(value) for name, value in program.constants.items()}
    for port, array in zip(program.inputs, inputs, strict=True):
        # Our packages take float16.
        values[port.name] = torch.from_numpy(array).half().float()
    last_uses = _last_uses(program)
    for operation, done in zip(program.operations, last_uses, strict=True):
        arguments = {argument: values[name] for argument, name in operation.inputs.items()}
        values[operation.output] = _rounded(_rule(operation.kind)(arguments), dtype=operation.dtype)
        for name in done:
            del values[name]
    result: Tensor = values[program.outputs[0].name]
    return result.numpy()


def _last_uses(program: Program) -> list[set[str]]:
    """For each operation the values that none after it reads; a decoder's together would fill gigabytes."""
    needed = {port.name for port in program.outputs}
    last_uses = []
    for operation in reversed(program.operations):
        last_uses.append(set(operation.inputs.values()) - needed)
        needed |= last_uses[-1]
    return last_uses[::-1]


def _operand(value: Any) -> Any:  # noqa: ANN401 - a number, a string or an array
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float32))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _rounded(result: Tensor, *, dtype: str) -> Tensor:
    return result.half().float() if dtype == "float16" else result


def _rule(kind: str) -> Callable[[Mapping[str, Any]], Tensor]:
    if kind not in _RULES:
        known = ", ".join(sorted(_RULES))
        raise UnknownOperationError(f"operation {kind!r} is not defined here; {known} are")
    return _RULES[kind]


def _conv(given: Mapping[str, Any]) -> Tensor:
    top, bottom, left, right = given["pad"] if given["pad_type"] == "custom" else (0, 0, 0, 0)
    return functional.conv2d(
        functional.pad(given["x"], (left, right, top, bottom)),
        given["weight"],
        given.get("bias"),
        stride=given["strides"],
        dilation=given["dilations"],
        groups=given["groups"],
    )


def _batch_norm(given: Mapping[str, Any]) -> Tensor:
    # What a GroupNorm's own weight and bias become: the moments are constants here, usually 0 and 1.
    x, mean, variance = given["x"], given["mean"], given["variance"]
    return functional.batch_norm(
        x, mean, variance, weight=given.get("gamma"), bias=given.get("beta"), eps=given["epsilon"]
    )


def _upsample(given: Mapping[str, Any]) -> Tensor:
    factors = (float(given["scale_factor_height"]), float(given["scale_factor_width"]))
    return functional.interpolate(given["x"], scale_factor=factors, mode="nearest")


def _matmul(given: Mapping[str, Any]) -> Tensor:
    x, y = given["x"], given["y"]
    x = x.transpose(-1, -2) if given.get("transpose_x") else x
    return x @ (y.transpose(-1, -2) if given.get("transpose_y") else y)


_RULES: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "add": lambda given: given["x"] + given["y"],
    "batch_norm": _batch_norm,
    "cast": lambda given: given["x"],
    "clip": lambda given: given["x"].clamp(given["alpha"], given["beta"]),
    "conv": _conv,
    "linear": lambda given: functional.linear(given["x"], given["weight"], given.get("bias")),
    "matmul": _matmul,
    "mul": lambda given: given["x"] * given["y"],
    "real_div": lambda given: given["x"] / given["y"],
    "reduce_mean": lambda given: given["x"].mean(given["axes"], keepdim=given["keep_dims"]),
    "reshape": lambda given: given["x"].reshape(given["shape"]),
    "silu": lambda given: functional.silu(given["x"]),
    "softmax": lambda given: given["x"].softmax(given["axis"]),
    "sqrt": lambda given: given["x"].sqrt(),
    "square": lambda given: given["x"].square(),
    "sub": lambda given: given["x"] - given["y"],
    "transpose": lambda given: given["x"].permute(given["perm"]),
    "upsample_nearest_neighbor": _upsample,
}
