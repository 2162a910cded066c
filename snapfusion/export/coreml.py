"""Core ML packages for iOS 17 and later: made, and read back from the disk to be checked."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from snapfusion.export.mil import Operation, Program
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.parity import ParityError
from snapfusion.export.quiet import quiet

WEIGHT_ERROR_LIMIT = 2.0**-10
"""Of the largest weight of a tensor. float16 rounds to half of this, and folding a factor rounds again."""

# Identifiers for tools that trace a program back to its source; a phone has no use for them.
_DEBUG_FILES = ("executorch_debug_handle_mapping.json",)
_CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


@dataclass(frozen=True, kw_only=True)
class CoreMLPort:
    """An input or output as the package itself states it; dtype is Core ML's word, for example FLOAT16."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class CoreMLDescription:
    """What a package says of itself once it is read back.

    Attributes:
        inputs: as stated.
        outputs: as stated.
        specification_version: 8 is iOS 17.
        operations: how many of each kind, constants left out.
        weight_bytes: size of the weight file.
        float32_weights: names of weights that were not stored as float16; none is expected.
    """

    inputs: tuple[CoreMLPort, ...]
    outputs: tuple[CoreMLPort, ...]
    specification_version: int
    operations: dict[str, int]
    weight_bytes: int
    float32_weights: tuple[str, ...]

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        return asdict(self)


def compile_coreml(module: FixedModule, package: Path) -> None:
    """Write the module as an `.mlpackage` folder: an ML program with float16 weights, ports and arithmetic.

    The same module gives the same bytes.

    Raises:
        ValueError: if there is something at `package` already.
    """
    if package.exists():
        raise ValueError(f"{package} exists; a package is never written over")
    package.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        import coremltools

        model = coremltools.convert(
            # ATen's core operations; coremltools does not know the training ones.
            module.trace().run_decompositions({}),
            inputs=[_tensor_type(coremltools, port) for port in module.inputs],
            outputs=[coremltools.TensorType(name=port.name, dtype=np.float16) for port in module.outputs],
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.precision.FLOAT16,
            skip_model_load=True,
        )
        del model.user_defined_metadata[_CONVERSION_DATE]
        partial = Path(scratch) / package.name
        model.save(str(partial))
        for name in _DEBUG_FILES:
            (partial / name).unlink(missing_ok=True)
        _settle_identifiers(partial / "Manifest.json")
        partial.rename(package)


def _tensor_type(coremltools: Any, port: Port) -> Any:  # noqa: ANN401 - coremltools has no types
    return coremltools.TensorType(name=port.name, shape=port.shape, dtype=np.float16)


def _settle_identifiers(manifest: Path) -> None:
    """Replace the random names of a package's items, so that the same module gives the same bytes."""
    text = manifest.read_text()
    for identifier, item in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(identifier, str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])))
    # The entries came in the order of their random names.
    manifest.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True) + "\n")


def describe_package(package: Path) -> CoreMLDescription:
    """Read a package back and say what it holds."""
    program = read_program(package)
    specification = _open(package).get_spec()
    weights = program.weights()
    return CoreMLDescription(
        inputs=_stated(specification.description.input),
        outputs=_stated(specification.description.output),
        specification_version=int(specification.specificationVersion),
        operations=dict(sorted(Counter(operation.kind for operation in program.operations).items())),
        weight_bytes=sum(path.stat().st_size for path in package.rglob("weight.bin")),
        float32_weights=tuple(sorted(name for name, array in weights.items() if array.dtype != np.float16)),
    )


def read_program(package: Path) -> Program:
    """The package's program as data: every operation and constant, from the files on disk.

    Raises:
        ValueError: if the package cannot be read.
    """
    model = _open(package)
    with quiet():
        from coremltools.converters.mil.frontend.milproto.load import load

        specification = model.get_spec()
        loaded = load(specification, specification.specificationVersion, model.weights_dir)
    function = loaded.functions["main"]
    constants = {op.outputs[0].name: op.outputs[0].val for op in function.operations if op.op_type == "const"}
    return Program(
        inputs=tuple(Port(name=name, shape=tuple(var.shape)) for name, var in function.inputs.items()),
        outputs=tuple(Port(name=var.name, shape=tuple(var.shape)) for var in function.outputs),
        constants=constants,
        operations=tuple(_operation(op) for op in function.operations if op.op_type != "const"),
    )


def check_weights(program: Program, parameters: Mapping[str, Tensor]) -> float:
    """Find each matrix and kernel of the network among the program's weights, rounded to float16.

    Vectors are left out: the converter folds constants into biases. A factor folded into a kernel is allowed
    for.

    Returns:
        The largest error, relative to the largest weight of its tensor; below `WEIGHT_ERROR_LIMIT`.

    Raises:
        ParityError: naming the first tensor that is not there.
    """
    weights = list(program.weights().values())
    worst = 0.0
    for name, tensor in parameters.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        wanted = tensor.detach().cpu().double().numpy().ravel()
        errors = [_relative_error(found, wanted=wanted) for found in weights if found.size == wanted.size]
        error = min(errors, default=float("inf"))
        if not error <= WEIGHT_ERROR_LIMIT:
            raise ParityError(
                f"the Core ML program lacks the network's weight {name}: the nearest differs by {error:.3g} "
                f"of its largest value, and {WEIGHT_ERROR_LIMIT:.3g} is the limit"
            )
        worst = max(worst, error)
    return worst


def _relative_error(found: np.ndarray, *, wanted: np.ndarray) -> float:
    values = found.astype(np.float64).ravel()
    energy = float(wanted @ wanted)
    factor = float(values @ wanted) / energy if energy else 1.0
    largest = float(np.abs(factor * wanted).max())
    difference = float(np.abs(values - factor * wanted).max())
    return difference / largest if largest else difference


def _open(package: Path) -> Any:  # noqa: ANN401 - coremltools has no types
    with quiet():
        import coremltools

        try:
            return coremltools.models.MLModel(str(package), skip_model_load=True)
        except Exception as error:
            raise ValueError(f"{package} is not a readable Core ML package: {error}") from error


def _stated(features: Any) -> tuple[CoreMLPort, ...]:  # noqa: ANN401 - a protobuf list
    from coremltools.proto import FeatureTypes_pb2

    name_of = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name
    return tuple(
        CoreMLPort(
            name=feature.name,
            shape=tuple(feature.type.multiArrayType.shape),
            dtype=name_of(feature.type.multiArrayType.dataType),
        )
        for feature in features
    )


def _operation(op: Any) -> Operation:  # noqa: ANN401 - coremltools has no types
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    (output,) = op.outputs
    return Operation(
        kind=op.op_type,
        inputs={name: var.name for name, var in op.inputs.items() if var is not None},
        output=output.name,
        dtype=np.dtype(nptype_from_builtin(output.dtype)).name,
    )
