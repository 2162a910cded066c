"""Compiles modules to ONNX models: float32, float16, or with 8-bit weights of matrix products."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from snapfusion.export.installed import ONNX_PACKAGES, check_installed
from snapfusion.export.modules import TIMESTEP, FixedModule
from snapfusion.export.quiet import quiet
from snapfusion.export.settings import OnnxKind

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

OPSET = 20
"""From 21 on GroupNormalization is one operation, with which ONNX Runtime is slower (docs/mobile.md)."""

MAX_FILE_BYTES = 2**31 - 2**20
"""Weights of a larger model are in a file of their own: a protocol buffer ends at 2 GB."""

_MIN_EXTERNAL_BYTES = 1024
_QUANTIZED = ("MatMul", "Gemm", "Gather")
"""Not convolutions, which are slower in 8 bits than in float32."""
_READERS_OF_SINUSOIDS = ("MatMul", "Gemm")


def import_onnx() -> None:
    """Import what exporting and converting models need, which takes seconds."""
    with quiet():
        import onnxruntime.quantization
        import onnxruntime.transformers.float16  # noqa: F401
        import onnxscript  # noqa: F401
        import torch.onnx._internal.exporter._core  # noqa: F401


def export_onnx(
    module: FixedModule, path: Path, *, opset: int = OPSET, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Export a module in float32 to the file `path`; large weights go to `weights_path(path)`.

    Raises:
        NotInstalledError: if a package that this needs is not installed.
    """
    _check_packages()
    with quiet():
        import torch.onnx
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        program = torch.onnx.export(
            module.trace(),
            dynamo=True,
            opset_version=opset,
            input_names=[port.name for port in module.inputs],
            output_names=[port.name for port in module.outputs],
            verbose=False,
        )
        if program is None:
            raise ValueError(f"torch exports no ONNX program of {module.name}")
        # Stack traces of torch's graph, of the size of the graph itself.
        ClearMetadataAndDocStringPass()(program.model)
        tensors = (value.const_value for value in program.model.graph.initializers.values())
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        # torch gives the second file the name of `weights_path`.
        program.save(path, external_data=size > max_file_bytes)


def convert_onnx(source: Path, path: Path, *, kind: OnnxKind, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Write a float32 model with other weights.

    Args:
        source: of `export_onnx`.
        path: of the new model, in another folder.
        kind: "float32" copies the model. "float16" computes in float16 but for the sinusoids of the timestep;
            inputs and outputs stay float32. "int8" keeps matrices in unsigned 8 bits, one scale for each
            matrix; what they are multiplied with is quantized by its range in each run.
        max_file_bytes: weights of a larger model go to `weights_path(path)`.
    """
    _check_packages()
    with quiet(), _without_default_handler():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        if kind == "int8":
            quantize_dynamic(
                source,
                path,
                op_types_to_quantize=list(_QUANTIZED),
                # A scale for each channel is not faster than float32.
                per_channel=False,
                # Signed ones have no fast kernel on x86 processors.
                weight_type=QuantType.QUInt8,
                use_external_data_format=_bytes_on_disk(source) > max_file_bytes,
            )
            return
        model = onnx.load(source)
        _save(model if kind == "float32" else _in_float16(model), path, max_file_bytes=max_file_bytes)


def weights_path(path: Path) -> Path:
    """The file beside a model that holds its weights, if they are not in the model."""
    return path.with_name(f"{path.name}.data")


def _bytes_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, weights_path(path)) if file.exists())


def count_operations(path: Path) -> int:
    """The number of a model's operations, as it lies on disk; weights are not read."""
    check_installed("onnx")
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


@contextlib.contextmanager
def _without_default_handler() -> Iterator[None]:
    """Keep the quantizer's advice from setting up a log that would outlive the error stream of `quiet`."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _check_packages() -> None:
    for package in ONNX_PACKAGES:
        check_installed(package)


def _save(model: ModelProto, path: Path, *, max_file_bytes: int) -> None:
    import onnx

    onnx.save(
        model,
        path,
        save_as_external_data=_num_bytes(model) > max_file_bytes,
        location=weights_path(path).name,
        size_threshold=_MIN_EXTERNAL_BYTES,
    )


def _num_bytes(model: ModelProto) -> int:
    """Of the weights; those of the whole message cannot be counted above 2 GB."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _in_float16(model: ModelProto) -> ModelProto:
    """The model in float16, between inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    sinusoids = _take_sinusoids(model.graph)
    # Without shapes, whose inference ends at 2 GB; torch's export has written them.
    converted = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    _put_back(converted.graph, sinusoids)
    # The converter appends its casts, and leaves types of results that are others now.
    OnnxModel(converted).topological_sort()
    del converted.graph.value_info[:]
    return converted


def _take_sinusoids(graph: GraphProto) -> GraphProto | None:
    """Cut the computation of the timestep's sinusoids out of a graph, which then has them as an input.

    The converter would round angles up to 999 to float16, also where it is told to leave nodes alone.

    Returns:
        The part that was cut out, from the timestep to the sinusoids; None for a graph without timestep.
    """
    from onnx import GraphProto

    if TIMESTEP not in {value.name for value in graph.input}:
        return None
    nodes, others = _separate_sinusoids(graph)
    computed = {name for node in nodes for name in node.output}
    read = {name for node in others for name in node.input}
    taken = {name for node in nodes for name in node.input} - read
    part = GraphProto(node=nodes)
    part.input.extend(value for value in graph.input if value.name == TIMESTEP)
    part.output.extend(value for value in graph.value_info if value.name in computed & read)
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in taken)
    _replace(graph.node, others)
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in taken])
    _replace(graph.value_info, [value for value in graph.value_info if value.name not in computed])
    _replace(graph.input, [each for each in graph.input if each.name != TIMESTEP])
    graph.input.extend(part.output)
    return part


def _separate_sinusoids(graph: GraphProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes between the timestep and the first layer that reads what is computed from it; all others."""
    known = {TIMESTEP}
    nodes: list[NodeProto] = []
    others: list[NodeProto] = []
    for node in graph.node:
        computed = node.op_type not in _READERS_OF_SINUSOIDS and known & set(node.input)
        (nodes if computed else others).append(node)
        known.update(node.output if computed else ())
    return nodes, others


def _put_back(graph: GraphProto, part: GraphProto | None) -> None:
    """Undo `_take_sinusoids` in a graph that was converted in between."""
    if part is None:
        return
    sinusoids = {value.name for value in part.output}
    inputs = [value for value in graph.input if value.name not in sinusoids]
    # Between z_t and c, where the module has it.
    inputs[1:1] = part.input
    _replace(graph.input, inputs)
    _replace(graph.node, [*part.node, *graph.node])
    graph.initializer.extend(part.initializer)


def _replace(field: object, values: Iterable[object]) -> None:
    """Replace the contents of a repeated field."""
    kept = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(kept)  # type: ignore[attr-defined]
