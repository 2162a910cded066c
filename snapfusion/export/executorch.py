"""ExecuTorch programs, lowered to XNNPACK or to Core ML: made, read, and executed where they are made."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from snapfusion.export.coreml import float16_on_ios17
from snapfusion.export.modules import FixedModule
from snapfusion.export.quiet import quiet

if TYPE_CHECKING:
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.schema import ExecutionPlan
    from executorch.extension.pybindings.portable_lib import TensorInfo
    from executorch.runtime import Method, Program

_METHOD = "forward"
_CORE_ML = "CoreMLBackend"
# executorch/runtime/core/portable_type/scalar_type.h
_DTYPES = {3: "int32", 4: "int64", 5: "float16", 6: "float32"}
# Where a program says how long its flatbuffer is; executorch/schema/extended_header.cpp.
_HEADER_BYTES = 64


def compile_executorch(
    module: FixedModule,
    *,
    weights: Literal["float32", "int8"] = "float32",
    delegate: Literal["xnnpack", "coreml"] = "xnnpack",
) -> bytes:
    """The module as the bytes of a `.pte`; what the delegate does not take runs in ExecuTorch's own kernels.

    Args:
        module: what to compile. For XNNPACK a UNet's attention is fastest in the form "diffusers".
        weights: "int8" keeps those of linear layers and convolutions in 8 bits, one scale for each output
            channel. What they are multiplied by is brought to 8 bits as the program runs, by its range then.
        delegate: "coreml" computes in float16, on Apple's systems of iOS 17 or later alone.

    Raises:
        ValueError: for int8 weights with Core ML.
    """
    if (weights, delegate) == ("int8", "coreml"):
        raise ValueError("8-bit weights are lowered to XNNPACK alone; give weights='float32' with Core ML")
    with quiet():
        from executorch.exir import to_edge_transform_and_lower

        traced = module.trace()
        if delegate == "xnnpack":
            traced = traced.run_decompositions(
                {torch.ops.aten.scaled_dot_product_attention.default: decomposed_attention}
            )
        if weights == "int8":
            traced = _quantized(traced, module.example())
        partitioners = [_coreml_partitioner()] if delegate == "coreml" else _xnnpack_partitioners(weights)
        lowered = to_edge_transform_and_lower(traced, partitioner=partitioners)
        return bytes(lowered.to_executorch().buffer)


def decomposed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of [B,H,S,d] in three operations, all of which XNNPACK takes.

    torch's own way to take it apart looks for rows that are masked from end to end and repeats every matrix
    for a batch: seven operations in ExecuTorch's slow kernels, on [B,H,S,S].
    """
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(
            "attention with dropout, a causal flag or shared keys; none of these is compiled here"
        )
    (batch, heads, positions, size), tokens = query.shape, key.shape[2]
    q = (query * (size**-0.5 if scale is None else scale)).reshape(batch * heads, positions, size)
    logits = torch.bmm(q, key.reshape(batch * heads, tokens, size).transpose(1, 2))
    if attn_mask is not None:
        logits = (logits.unflatten(0, (batch, heads)) + attn_mask).flatten(0, 1)
    mixed = torch.bmm(logits.softmax(dim=-1), value.reshape(batch * heads, tokens, -1))
    return mixed.unflatten(0, (batch, heads))


def _quantized(traced: ExportedProgram, example: tuple[Tensor, ...]) -> ExportedProgram:
    """The same with 8-bit weights, and with the steps that bring activations to 8 bits."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_global(config).set_filter_function(_is_only_reader)
    observed = prepare_pt2e(traced.module(), quantizer)
    with torch.no_grad():
        # Only weights are observed: ranges of activations are found anew in every run.
        observed(*example)
        return torch.export.export(convert_pt2e(observed), example, strict=False)


def _is_only_reader(node: torch.fx.Node) -> bool:
    """Whether a convolution shares its input with no other: of such a pair one is lowered wrongly."""
    convolution = torch.ops.aten.conv2d.default
    if node.target != convolution:
        return True
    return sum(user.target == convolution for user in node.all_input_nodes[0].users) == 1


def _xnnpack_partitioners(weights: Literal["float32", "int8"]) -> list[XnnpackPartitioner]:
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Convolutions(XnnpackPartitioner):
        """A delegate's call for each 8-bit convolution, before the others are put together.

        To bring its input from [B,C,H,W] to [B,H,W,C], the lowering walks back to the input of the whole
        call, and moves that; what lies between would be computed along the wrong axes.
        """

        def __init__(self) -> None:
            precision = ConfigPrecisionType.DYNAMIC_QUANT
            super().__init__(configs=[ConvolutionConfig], config_precisions=precision, per_op_mode=True)

        def ops_to_not_decompose(
            self, ep: ExportedProgram
        ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
            """Linear layers too, or there are none left for the next."""
            return together.ops_to_not_decompose(ep)

    together = XnnpackPartitioner()
    return [Convolutions(), together] if weights == "int8" else [together]


def _coreml_partitioner() -> CoreMLPartitioner:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(**float16_on_ios17())
    return CoreMLPartitioner(compile_specs=specs)


def set_num_threads(number: int) -> None:
    """Give ExecuTorch's pool so many threads; programs that are open keep what they were opened with.

    Left alone it has one for each core of the machine, whatever torch was told.
    """
    with quiet():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(number)


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
                raise ValueError(f"not an ExecuTorch program: {_describe_source(source)}: {error}") from error

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
        plan = _execution_plan(source)
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


def extract_package(source: bytes | Path, package: Path) -> None:
    """Write the Core ML package that a program hands to its delegate, to be read as any other.

    Args:
        source: a program that Core ML's delegate computes from end to end.
        package: an `.mlpackage` folder, in a folder that exists.

    Raises:
        ValueError: if that is no such program, or `package` exists.
    """
    delegates = describe_program(source).delegates
    if delegates != {_CORE_ML: 1}:
        raise ValueError(f"{_describe_source(source)} calls {delegates}; one call of {_CORE_ML} is accepted")
    if package.exists():
        raise ValueError(f"{package} exists; a package is never written over")
    with quiet(), tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        from executorch.backends.apple.coreml import executorchcoreml
        from executorch.exir._serialize._program import _extract_delegate_payload

        whole = source if isinstance(source, bytes) else source.read_bytes()
        payload = _extract_delegate_payload(whole, _CORE_ML)
        if not executorchcoreml.unflatten_directory_contents(payload, scratch):
            raise ValueError(f"{_describe_source(source)} holds no readable Core ML package")
        (Path(scratch) / "lowered_module" / "model.mlpackage").rename(package)


def _load(source: bytes | Path) -> Program:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"there is no file {source}; give the path of a .pte")
    from executorch.runtime import Runtime, Verification

    try:
        return Runtime.get().load_program(source, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise ValueError(f"not an ExecuTorch program: {_describe_source(source)}: {error}") from error


def _ports(program: Program) -> tuple[tuple[ProgramPort, ...], tuple[ProgramPort, ...]]:
    """Inputs and outputs."""
    meta = program.metadata(_METHOD)
    inputs = (_port(meta.input_tensor_meta(number)) for number in range(meta.num_inputs()))
    outputs = (_port(meta.output_tensor_meta(number)) for number in range(meta.num_outputs()))
    return tuple(inputs), tuple(outputs)


def _port(info: TensorInfo) -> ProgramPort:
    return ProgramPort(shape=tuple(info.sizes()), dtype=_DTYPES.get(info.dtype(), f"type {info.dtype()}"))


def _execution_plan(source: bytes | Path) -> ExecutionPlan:
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
    lacking = sorted({delegate.id for delegate in _execution_plan(source).delegates} - set(here))
    if lacking:
        raise ValueError(
            f"{_describe_source(source)} is lowered for {' and '.join(lacking)}, but ExecuTorch has {', '.join(here)} "
            "here: run it where the delegate is, or give a program that is lowered for XNNPACK"
        )


def _shapes(inputs: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    return [array.shape for array in inputs]


def _describe_source(source: bytes | Path) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
