"""Compiles, describes and executes ExecuTorch programs, lowered to XNNPACK or to Core ML."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from snapfusion.export.coreml import check_absent, float16_on_ios17
from snapfusion.export.deferred_code import deferred_code
from snapfusion.export.installed import check_installed
from snapfusion.export.modules import FixedModule, check_shapes
from snapfusion.export.quiet import quiet
from snapfusion.export.settings import ExecuTorchKind

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
# The extended header states the flatbuffer's length; executorch/schema/extended_header.cpp.
_HEADER_BYTES = 64


def import_executorch() -> None:
    """Import what compiling, opening and executing programs need, which takes seconds."""
    with quiet():
        import executorch.backends.xnnpack.partition.xnnpack_partitioner
        import executorch.backends.xnnpack.quantizer.xnnpack_quantizer
        import executorch.exir
        import executorch.runtime  # noqa: F401
        import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401


def compile_executorch(module: FixedModule, *, kind: ExecuTorchKind = "float32") -> bytes:
    """Compile a module to the bytes of a `.pte`; ExecuTorch's kernels run what the delegate does not take.

    Args:
        module: to compile. For XNNPACK a UNet's attention is fastest in the layout "diffusers".
        kind: "float32" lowers to XNNPACK. "int8" does so with linear layers and convolutions in 8 bits, one
            scale for each output channel; their inputs are quantized by their range in each run. "coreml"
            lowers to Core ML in float16, for iOS 17 or later.
    """
    check_installed("executorch")
    if kind == "coreml":
        check_installed("coremltools")
    with quiet(), deferred_code():
        from executorch.exir import to_edge_transform_and_lower

        traced = module.trace()
        if kind != "coreml":
            attention = torch.ops.aten.scaled_dot_product_attention.default
            traced = traced.run_decompositions({attention: decomposed_attention})
        if kind == "int8":
            traced = _quantized(traced, module.example())
        partitioners = [_coreml_partitioner()] if kind == "coreml" else _xnnpack_partitioners(kind)
        return bytes(to_edge_transform_and_lower(traced, partitioner=partitioners).to_executorch().buffer)


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

    torch's own decomposition looks for rows that are entirely masked and repeats every matrix for a batch:
    seven operations in ExecuTorch's slow kernels, on [B,H,S,S].
    """
    if dropout_p or is_causal or enable_gqa:
        raise ValueError("attention with dropout, a causal flag or shared keys is not supported")
    (batch, heads, positions, size), tokens = query.shape, key.shape[2]
    q = (query * (size**-0.5 if scale is None else scale)).reshape(batch * heads, positions, size)
    logits = torch.bmm(q, key.reshape(batch * heads, tokens, size).transpose(1, 2))
    if attn_mask is not None:
        logits = (logits.unflatten(0, (batch, heads)) + attn_mask).flatten(0, 1)
    mixed = torch.bmm(logits.softmax(dim=-1), value.reshape(batch * heads, tokens, -1))
    return mixed.unflatten(0, (batch, heads))


def _quantized(traced: ExportedProgram, example: tuple[Tensor, ...]) -> ExportedProgram:
    """The program with 8-bit weights and operations that quantize activations."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    # Per channel, because XNNPACK takes no operation with dynamic inputs and one scale per tensor.
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_global(config).set_filter_function(_is_only_reader)
    observed = prepare_pt2e(traced.module(), quantizer)
    with torch.no_grad():
        # Zeros suffice: only weights are observed, ranges of activations are computed in every run.
        observed(*example)
        return torch.export.export(convert_pt2e(observed), example, strict=False)


def _is_only_reader(node: torch.fx.Node) -> bool:
    """Whether no other convolution reads a convolution's input: one of such a pair is lowered wrongly."""
    convolution = torch.ops.aten.conv2d.default
    if node.target != convolution:
        return True
    return sum(user.target == convolution for user in node.all_input_nodes[0].users) == 1


def _xnnpack_partitioners(kind: ExecuTorchKind) -> list[XnnpackPartitioner]:
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Convolutions(XnnpackPartitioner):
        """Delegates each 8-bit convolution in a call of its own, before the others are grouped.

        To permute its input from [B,C,H,W] to [B,H,W,C], the lowering walks back to the input of the whole
        call and permutes that; operations in between would be computed along the wrong axes.
        """

        def __init__(self) -> None:
            precision = ConfigPrecisionType.DYNAMIC_QUANT
            super().__init__(configs=[ConvolutionConfig], config_precisions=precision, per_op_mode=True)

        def ops_to_not_decompose(
            self, ep: ExportedProgram
        ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
            """Includes linear layers: if decomposed here, the second partitioner would not find them."""
            return grouped.ops_to_not_decompose(ep)

    grouped = XnnpackPartitioner()
    return [Convolutions(), grouped] if kind == "int8" else [grouped]


def _coreml_partitioner() -> CoreMLPartitioner:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    return CoreMLPartitioner(compile_specs=CoreMLBackend.generate_compile_specs(**float16_on_ios17()))


def set_num_threads(num_threads: int) -> None:
    """Set the size of ExecuTorch's thread pool; open programs keep the pool that they were opened with.

    By default it has one thread for each core of the machine, regardless of torch's setting.
    """
    check_installed("executorch")
    with quiet():
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(num_threads)


@dataclass(frozen=True, kw_only=True)
class ProgramPort:
    """An input or output as a program states it; a `.pte` has no names. The dtype is NumPy's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ProgramDescription:
    """Contents of a `.pte`, whether or not this machine can execute it.

    Attributes:
        delegates: number of calls of each delegate, such as XnnpackBackend.
        kernels: number of calls of each of ExecuTorch's own kernels, which run what no delegate took.
    """

    delegates: dict[str, int]
    kernels: dict[str, int]


class ExecuTorchProgram:
    """A `.pte` in ExecuTorch's runtime on this machine.

    Args:
        source: the program's bytes, or the path of its file. A file is memory-mapped: a delegate reads
            weights from it while it packs them, so that they are not in memory twice.

    Raises:
        ValueError: if it is no ExecuTorch program, or one lowered for a delegate that is not available.
    """

    def __init__(self, source: bytes | Path) -> None:
        with quiet():
            # Kept, because it owns the bytes that its method reads from.
            self._program = _load(source)
            meta = self._program.metadata(_METHOD)
            self.inputs = _ports(map(meta.input_tensor_meta, range(meta.num_inputs())))
            self.outputs = _ports(map(meta.output_tensor_meta, range(meta.num_outputs())))
            try:
                self._method: Method = self._program.load_method(_METHOD)
            except RuntimeError as error:
                # The runtime's error code does not distinguish a missing delegate from a damaged program.
                _check_delegates(source)
                raise ValueError(f"not an ExecuTorch program: {_describe_source(source)}: {error}") from error

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Execute on one set of inputs; returns the first output, of the shape and dtype in `outputs`.

        Args:
            inputs: of the shapes in `inputs`; any precision for floating-point inputs, the exact dtype for
                integer inputs.

        Raises:
            ValueError: if the program does not accept the inputs.
        """
        return self.prepared(inputs)()

    def prepared(self, inputs: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        """Check a set of inputs once; returns a function that executes on them, as a call does.

        Args and errors as of a call.
        """
        check_shapes(inputs, accepted=[port.shape for port in self.inputs])
        tensors = [
            _tensor(array, port, index)
            for index, (array, port) in enumerate(zip(inputs, self.inputs, strict=True))
        ]

        def execute() -> np.ndarray:
            try:
                # Copied, because the runtime returns its own memory, which the next execution overwrites.
                output: np.ndarray = self._method.execute(tensors)[0].numpy().copy()
            except RuntimeError as error:
                shapes = [array.shape for array in inputs]
                raise ValueError(f"the program fails on inputs of shapes {shapes}: {error}") from error
            return output

        return execute


def _tensor(array: np.ndarray, port: ProgramPort, index: int) -> Tensor:
    floating = np.issubdtype(array.dtype, np.floating) and port.dtype.startswith("float")
    if not floating and array.dtype != port.dtype:
        raise ValueError(f"input {index} is {array.dtype}; the program accepts {port.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=port.dtype))


def describe_program(source: bytes | Path) -> ProgramDescription:
    """Describe a program; its delegates need not be available.

    Args:
        source: its bytes, or the path of its file, of which no weight is read.

    Raises:
        ValueError: if it is no ExecuTorch program.
    """
    with quiet():
        # Loaded, because the runtime verifies the file: the plan's reader does not.
        _load(source)
        plan = _execution_plan(source)
    delegates, kernels = Counter[str](), Counter[str]()
    for call in (instruction.instr_args for chain in plan.chains for instruction in chain.instructions):
        if hasattr(call, "delegate_index"):
            delegates[plan.delegates[call.delegate_index].id] += 1
        elif hasattr(call, "op_index"):
            kernels[plan.operators[call.op_index].name] += 1
    return ProgramDescription(delegates=dict(delegates), kernels=dict(kernels))


def extract_package(source: bytes | Path, package: Path) -> None:
    """Write the Core ML package that a program contains for its delegate.

    Args:
        source: a program that is computed entirely by Core ML's delegate.
        package: an `.mlpackage` folder.

    Raises:
        ValueError: if `source` is no such program, or `package` exists.
    """
    delegates = describe_program(source).delegates
    if delegates != {_CORE_ML: 1}:
        raise ValueError(f"{_describe_source(source)} calls {delegates}; one call of {_CORE_ML} is accepted")
    check_absent(package)
    with quiet(), tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        from executorch.backends.apple.coreml import executorchcoreml
        from executorch.exir._serialize._program import _extract_delegate_payload

        program = source if isinstance(source, bytes) else source.read_bytes()
        payload = _extract_delegate_payload(program, _CORE_ML)
        if not executorchcoreml.unflatten_directory_contents(payload, scratch):
            raise ValueError(f"{_describe_source(source)} holds no readable Core ML package")
        (Path(scratch) / "lowered_module" / "model.mlpackage").rename(package)


def _load(source: bytes | Path) -> Program:
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"there is no file {source}; give the path of a .pte")
    check_installed("executorch")
    from executorch.runtime import Runtime, Verification

    try:
        return Runtime.get().load_program(source, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise ValueError(f"not an ExecuTorch program: {_describe_source(source)}: {error}") from error


def _ports(infos: Iterable[TensorInfo]) -> tuple[ProgramPort, ...]:
    return tuple(
        ProgramPort(shape=tuple(info.sizes()), dtype=_DTYPES.get(info.dtype(), f"type {info.dtype()}"))
        for info in infos
    )


def _execution_plan(source: bytes | Path) -> ExecutionPlan:
    """The method's instructions, from a program that the runtime has verified.

    ExecuTorch's Python interface does not expose them. Weights follow the instructions and are not read.
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

    available = Runtime.get().backend_registry.registered_backend_names
    missing = sorted({delegate.id for delegate in _execution_plan(source).delegates} - set(available))
    if missing:
        raise ValueError(
            f"{_describe_source(source)} is lowered for {' and '.join(missing)}, but ExecuTorch has "
            f"{', '.join(available)} on this machine; run it where that delegate is available, or give a "
            "program that is lowered for XNNPACK"
        )


def _describe_source(source: bytes | Path) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)
