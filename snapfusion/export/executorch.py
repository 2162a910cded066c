"""ExecuTorch programs, lowered to XNNPACK: made, and executed where they are made."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from snapfusion.export.modules import FixedModule
from snapfusion.export.quiet import quiet

if TYPE_CHECKING:
    from executorch.exir.schema import ExecutionPlan
    from executorch.extension.pybindings.portable_lib import TensorInfo
    from executorch.runtime import Method, Program

_METHOD = "forward"
# executorch/runtime/core/portable_type/scalar_type.h
_DTYPES = {3: "int32", 4: "int64", 5: "float16", 6: "float32"}
# Where a program says how long its flatbuffer is; executorch/schema/extended_header.cpp.
_HEADER_BYTES = 64


def compile_executorch(module: FixedModule) -> bytes:
    """The module as the bytes of a `.pte`; what XNNPACK does not take runs in ExecuTorch's own kernels."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(module.trace(), partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


@dataclass(frozen=True, kw_only=True)
class ProgramPort:
    """An input or an output as a program itself states it; a `.pte` keeps no names.

    Attributes:
        shape: fixed.
        dtype: in numpy's words.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ProgramDescription:
    """What a `.pte` says of itself, whether or not this machine can execute it.

    Attributes:
        inputs: as stated.
        outputs: as stated.
        delegates: calls of each delegate, such as XnnpackBackend.
        kernels: calls of each of ExecuTorch's own kernels, for what no delegate took.
        planned_bytes: memory for what passes between those; delegates hold more of their own.
    """

    inputs: tuple[ProgramPort, ...]
    outputs: tuple[ProgramPort, ...]
    delegates: dict[str, int]
    kernels: dict[str, int]
    planned_bytes: int


class ExecuTorchProgram:
    """A `.pte` in ExecuTorch's runtime on this machine.

    Args:
        source: the program's bytes, or the path of its file. A file is mapped into memory: a delegate reads
            weights from it while it packs them, and they are not held a second time.

    Raises:
        ValueError: if that is no ExecuTorch program, or one lowered for a delegate that is not here.
    """

    def __init__(self, source: bytes | Path) -> None:
        with quiet():
            # It keeps the bytes, which the runtime reads from for as long as it lives.
            self._program = _load(source)
            self.inputs, self.outputs = _ports(self._program)
            try:
                self._method: Method = self._program.load_method(_METHOD)
            except RuntimeError as error:
                # The runtime tells a delegate that it lacks from damage by a number alone.
                _check_delegates(source)
                raise ValueError(f"not an ExecuTorch program: {_name(source)}: {error}") from error

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Execute on one set of inputs; the first output, of the shape and dtype in `outputs`.

        Args:
            inputs: of the shapes in `inputs`; where floating point is stated, of any precision, and where
                integers are, of that very type.

        Raises:
            ValueError: if the program refuses the inputs.
        """
        self._check(inputs)
        tensors = [
            torch.from_numpy(np.ascontiguousarray(array, dtype=port.dtype))
            for array, port in zip(inputs, self.inputs, strict=True)
        ]
        try:
            # A copy, because the runtime gives its own memory, which the next execution overwrites.
            output: np.ndarray = self._method.execute(tensors)[0].numpy().copy()
        except RuntimeError as error:
            raise ValueError(f"the program fails on inputs of shapes {_shapes(inputs)}: {error}") from error
        return output

    def _check(self, inputs: Sequence[np.ndarray]) -> None:
        accepted = [port.shape for port in self.inputs]
        if _shapes(inputs) != accepted:
            raise ValueError(
                f"the program refuses inputs of shapes {_shapes(inputs)}; {accepted} is accepted"
            )
        for number, (array, port) in enumerate(zip(inputs, self.inputs, strict=True)):
            floating = np.issubdtype(array.dtype, np.floating) and port.dtype.startswith("float")
            if not floating and array.dtype != port.dtype:
                raise ValueError(f"input {number} is {array.dtype}; the program accepts {port.dtype}")


def describe_program(source: bytes | Path) -> ProgramDescription:
    """What a program says of itself; its delegates need not be here.

    Args:
        source: its bytes, or the path of its file, of which no weight is read.

    Raises:
        ValueError: if that is no ExecuTorch program.
    """
    with quiet():
        inputs, outputs = _ports(_load(source))
        plan = _plan(source)
    delegates: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for instruction in (instruction for chain in plan.chains for instruction in chain.instructions):
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            delegates[plan.delegates[call.delegate_index].id] += 1
        elif hasattr(call, "op_index"):
            kernels[plan.operators[call.op_index].name] += 1
    return ProgramDescription(
        inputs=inputs,
        outputs=outputs,
        delegates=dict(delegates),
        kernels=dict(kernels),
        planned_bytes=sum(plan.non_const_buffer_sizes),
    )


def _load(source: bytes | Path) -> Program:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"there is no file {source}; give the path of a .pte")
    from executorch.runtime import Runtime, Verification

    try:
        return Runtime.get().load_program(source, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise ValueError(f"not an ExecuTorch program: {_name(source)}: {error}") from error


def _ports(program: Program) -> tuple[tuple[ProgramPort, ...], tuple[ProgramPort, ...]]:
    """Inputs and outputs."""
    meta = program.metadata(_METHOD)
    inputs = (_port(meta.input_tensor_meta(number)) for number in range(meta.num_inputs()))
    outputs = (_port(meta.output_tensor_meta(number)) for number in range(meta.num_outputs()))
    return tuple(inputs), tuple(outputs)


def _port(info: TensorInfo) -> ProgramPort:
    return ProgramPort(shape=tuple(info.sizes()), dtype=_DTYPES.get(info.dtype(), f"type {info.dtype()}"))


def _plan(source: bytes | Path) -> ExecutionPlan:
    """The one method's instructions, from a program that the runtime has verified.

    Its Python interface does not hand them out. No weight is read: they come after the instructions.
    """
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header

    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        header = _get_extended_header(file.read(_HEADER_BYTES))
        file.seek(0)
        program = _flatbuffer_to_program(file.read(header.program_size))
    return program.execution_plan[0]


def _check_delegates(source: bytes | Path) -> None:
    from executorch.runtime import Runtime

    here = Runtime.get().backend_registry.registered_backend_names
    lacking = sorted({delegate.id for delegate in _plan(source).delegates} - set(here))
    if lacking:
        raise ValueError(
            f"{_name(source)} is lowered for {' and '.join(lacking)}, but ExecuTorch has {', '.join(here)} "
            "here: run it where the delegate is, or give a program that is lowered for XNNPACK"
        )


def _shapes(inputs: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    return [array.shape for array in inputs]


def _name(source: bytes | Path) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
