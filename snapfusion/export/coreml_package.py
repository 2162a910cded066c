"""Reads Core ML packages from disk: as descriptions, as programs that torch evaluates, or on a Mac to run."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from snapfusion.export.installed import check_installed
from snapfusion.export.loop import RunModule
from snapfusion.export.mil import MilProgram, Operation, Value
from snapfusion.export.parity import ParityError
from snapfusion.export.quiet import quiet

WEIGHT_ERROR_LIMIT = 2.0**-10
"""Of the largest weight of a tensor. float16 rounds to half of this, and folding a factor rounds again."""

SINUSOIDS = ("sin", "cos")
"""The timestep's embedding; computed in float32 together with the angles that they are computed from."""

IOS17_SPECIFICATION = 8
"""Core ML's specification version of iOS 17."""

CoreMLObject = Any  # coremltools has no types

# Number of elements that candidate weights are compared on first.
_NUM_PROBES = 4096


@dataclass(frozen=True, kw_only=True)
class CoreMLDescription:
    """Contents of a package as read back; ports have Core ML's dtypes, for example FLOAT16.

    Attributes:
        inputs: as stated.
        outputs: as stated.
        specification_version: 8 is iOS 17.
        operations: number of each kind, without constants.
        weight_bytes: size of the weight file.
        float32_weights: names of weights that are not float16, except the timestep's frequencies; expected to
            be empty.
        float32_results: names of results computed in float32, except the timestep's sines and cosines and the
            values that they are computed from; expected to be empty.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    specification_version: int
    operations: dict[str, int]
    weight_bytes: int
    float32_weights: tuple[str, ...]
    float32_results: tuple[str, ...]


def describe_package(package: Path) -> CoreMLDescription:
    """Read a package back and describe it.

    Raises:
        ValueError: if it cannot be read, has a weight that is not finite, or needs a system after iOS 17.
    """
    program = read_program(package)
    specification = open_package(package).get_spec()
    _check_target(program, version=int(specification.specificationVersion))
    for name, array in program.weights().items():
        if not np.isfinite(array).all():
            raise ValueError(f"weight {name} of the package, of shape {array.shape}, is not finite")
    exact = program.before(SINUSOIDS)
    wide_weights = {name for name, array in program.weights().items() if array.dtype != np.float16}
    wide_results = {value.name for value in program.results() if value.dtype == "float32"}
    sinusoids = {operation.name for operation in program.operations if operation.kind in SINUSOIDS}
    return CoreMLDescription(
        inputs=_read_ports(specification.description.input),
        outputs=_read_ports(specification.description.output),
        specification_version=int(specification.specificationVersion),
        operations=dict(sorted(Counter(operation.kind for operation in program.operations).items())),
        weight_bytes=sum(path.stat().st_size for path in package.rglob("weight.bin")),
        float32_weights=tuple(sorted(wide_weights - exact)),
        float32_results=tuple(sorted(wide_results - exact - sinusoids)),
    )


def _check_target(program: MilProgram, *, version: int) -> None:
    from coremltools import target
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    kinds = {operation.kind for operation in program.operations}
    later = sorted(kind for kind in kinds if target.iOS17 not in SSAOpRegistry.core_ops[kind])
    if later or version > IOS17_SPECIFICATION:
        what = f"operations {', '.join(later)}" if later else f"specification version {version}"
        raise ValueError(f"the package needs a later system than iOS 17: {what}; compile it for iOS 17")


def read_program(package: Path) -> MilProgram:
    """Read the package's program as data: every operation and constant, from the files on disk.

    Raises:
        ValueError: if the package cannot be read.
    """
    model = open_package(package)
    with quiet():
        try:
            loaded = load_specification(model.get_spec(), weights=model.weights_dir)
        except Exception as error:
            raise ValueError(f"{package} is not a readable Core ML package: {error}") from error
    function = loaded.functions["main"]
    return MilProgram(
        inputs=tuple(map(_value, function.inputs.values())),
        outputs=tuple(map(_value, function.outputs)),
        constants={
            op.outputs[0].name: op.outputs[0].val for op in function.operations if op.op_type == "const"
        },
        operations=tuple(_operation(op) for op in function.operations if op.op_type != "const"),
    )


def check_weights(programs: MilProgram | Sequence[MilProgram], parameters: Mapping[str, Tensor]) -> float:
    """Find each matrix and kernel of the network among the programs' weights, rounded to float16.

    Vectors are skipped, because the converter folds constants into biases. A factor that it folded into a
    kernel is accounted for.

    Args:
        programs: one, or its two halves.
        parameters: of the network, by name.

    Returns:
        The largest error, relative to the largest weight of its tensor; below `WEIGHT_ERROR_LIMIT`.

    Raises:
        ParityError: naming the first tensor that is not found.
    """
    weights = defaultdict(list)
    for part in [programs] if isinstance(programs, MilProgram) else programs:
        for weight in part.weights().values():
            weights[weight.size].append(weight.ravel())
    worst = 0.0
    for name, tensor in parameters.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        expected = tensor.detach().cpu().numpy().ravel()
        error = _least_error(weights[expected.size], expected=expected)
        # Negated, so that NaN is refused too.
        if not error <= WEIGHT_ERROR_LIMIT:
            raise ParityError(
                f"the Core ML program lacks the network's weight {name}: the nearest differs by {error:.3g} "
                f"of its largest value, and {WEIGHT_ERROR_LIMIT:.3g} is the limit"
            )
        worst = max(worst, error)
    return worst


def _least_error(weights: Sequence[np.ndarray], *, expected: np.ndarray) -> float:
    # A full-size UNet has dozens of tensors of each size: a few elements suffice to find the nearest.
    probes = slice(None, None, max(1, expected.size // _NUM_PROBES))
    ranked = sorted(weights, key=lambda weight: _relative_error(weight[probes], expected=expected[probes]))
    return _relative_error(ranked[0], expected=expected) if ranked else float("inf")


def _relative_error(weight: np.ndarray, *, expected: np.ndarray) -> float:
    values, target = weight.astype(np.float64), expected.astype(np.float64)
    energy = float(target @ target)
    # Least squares: the factor that the converter may have folded into the kernel.
    factor = float(values @ target) / energy if energy else 1.0
    largest = float(np.abs(factor * target).max())
    difference = float(np.abs(values - factor * target).max())
    return difference / largest if largest else difference


def open_package(package: Path) -> CoreMLObject:
    """Open a package with coremltools without loading it into Core ML.

    Raises:
        ValueError: if it cannot be read.
    """
    check_installed("coremltools")
    with quiet():
        import coremltools

        try:
            return coremltools.models.MLModel(str(package), skip_model_load=True)
        except Exception as error:
            raise ValueError(f"{package} is not a readable Core ML package: {error}") from error


def open_packages(packages: Sequence[Path]) -> RunModule:
    """Load a module's packages into Core ML, on its Neural Engine where possible; on a Mac only.

    Raises:
        ValueError: if Core ML is not available, or does not load a package.
    """
    check_installed("coremltools")
    with quiet():
        import coremltools

        units = coremltools.ComputeUnit.CPU_AND_NE
        try:
            models = [coremltools.models.MLModel(str(path), compute_units=units) for path in packages]
            names = [[feature.name for feature in model.get_spec().description.input] for model in models]
        except Exception as error:
            raise ValueError(f"Core ML does not load {packages[0].name}: {error}") from error

    def run(inputs: Sequence[np.ndarray]) -> np.ndarray:
        values = dict(zip(names[0], inputs, strict=True))
        outputs: dict[str, np.ndarray] = {}
        for model, required in zip(models, names, strict=True):
            outputs = model.predict({name: values[name] for name in required})
            values |= outputs
        return next(iter(outputs.values())).astype(np.float32)

    return run


def load_specification(specification: CoreMLObject, *, weights: str) -> CoreMLObject:
    """The MIL program of a specification, with weights from the folder `weights`."""
    from coremltools.converters.mil.frontend.milproto.load import load

    return load(specification, specification.specificationVersion, weights)


def _read_ports(features: CoreMLObject) -> tuple[Value, ...]:
    from coremltools.proto import FeatureTypes_pb2

    dtype_name = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name
    arrays = [(feature.name, feature.type.multiArrayType) for feature in features]
    return tuple(Value(name=name, shape=tuple(a.shape), dtype=dtype_name(a.dataType)) for name, a in arrays)


def _operation(op: CoreMLObject) -> Operation:
    return Operation(
        kind=op.op_type,
        inputs={argument: _names(value) for argument, value in op.inputs.items() if value is not None},
        outputs=tuple(map(_value, op.outputs)),
    )


def _names(value: CoreMLObject) -> str | tuple[str, ...]:
    return tuple(var.name for var in value) if isinstance(value, list | tuple) else str(value.name)


def _value(var: CoreMLObject) -> Value:
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    return Value(name=var.name, shape=tuple(var.shape), dtype=np.dtype(nptype_from_builtin(var.dtype)).name)
