"""Core ML packages for iOS 17 and later: made, and read back from the disk to be checked."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from snapfusion.export.mil import FLOAT16_MAX, MilProgram, Operation, Value
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.palette import palettize
from snapfusion.export.parity import ParityError
from snapfusion.export.quiet import quiet
from snapfusion.export.split_program import split_program

WEIGHT_ERROR_LIMIT = 2.0**-10
"""Of the largest weight of a tensor. float16 rounds to half of this, and folding a factor rounds again."""

TIMESTEP = "t"
"""The port that stays in float32, and all that is computed of it up to its sines and cosines."""

SINUSOIDS = ("sin", "cos")
# What lies between a timestep and its waves; the search for them ends at any other kind.
_BEFORE_SINUSOIDS = ("mul", "expand_dims", "tile", "slice_by_index", "reshape", "cast")

WeightFormat = Literal["float16", "palette-6", "palette-8", "int8"]
"""How weights are kept: as they are; by a palette of 6 or 8 bits; as whole numbers of 8 bits."""

PALETTE_BITS: dict[str, int] = {"palette-6": 6, "palette-8": 8}
"""Bits of an index."""

MIN_COMPRESSED_SIZE = 2048
"""Tensors of no more numbers are not compressed: their palettes would be as large."""

IOS17_SPECIFICATION = 8
"""Its specification version."""

# Values by which weights of one size are told apart.
_NUM_PROBES = 4096

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
        float32_weights: names of weights that were not stored as float16, but for the timestep's frequencies;
            none is expected.
        float32_results: names of results computed in float32, but for the timestep's waves and what they are
            computed from; none is expected.
    """

    inputs: tuple[CoreMLPort, ...]
    outputs: tuple[CoreMLPort, ...]
    specification_version: int
    operations: dict[str, int]
    weight_bytes: int
    float32_weights: tuple[str, ...]
    float32_results: tuple[str, ...]

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        return asdict(self)


def compile_coreml(module: FixedModule, package: Path) -> None:
    """Write the module as an `.mlpackage` folder: an ML program with float16 weights, ports and arithmetic.

    Token ids are int32. The timestep is float32, and so is what is computed of it until its sines and
    cosines are taken: their angles reach 999, where float16 would round them by up to a quarter of a radian.
    That is five operations of a thousand.

    The same module gives the same bytes.

    Raises:
        ValueError: if there is something at `package` already, or a weight is beyond float16.
    """
    _check_absent(package)
    _check_range(module)
    with quiet():
        import coremltools

        model = coremltools.convert(
            # ATen's core operations; coremltools does not know the training ones.
            module.trace().run_decompositions({}),
            inputs=[_tensor_type(coremltools, port) for port in module.inputs],
            outputs=[coremltools.TensorType(name=port.name, dtype=np.float16) for port in module.outputs],
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.transform.FP16ComputePrecision(op_selector=_fits_float16),
            skip_model_load=True,
        )
        _save(model, package)


def compress_package(package: Path, target: Path, *, weights: WeightFormat) -> None:
    """Write the package once more, its matrices and kernels compressed; vectors stay as they are.

    iOS 17 knows one palette a tensor, and one scale a channel. The same package gives the same bytes.

    Args:
        package: with float16 weights; the halves of a program that was cut, each by itself.
        target: the new package.
        weights: "palette-6" and "palette-8" give each tensor 64 or 256 values to be chosen from by k-means,
            "int8" gives each output channel a scale for whole numbers of -127 .. 127; "float16" is a copy.

    Raises:
        ValueError: if there is something at `target` already, or the package cannot be read.
    """
    _check_absent(target)
    model = _open(package)
    if weights == "float16":
        shutil.copytree(package, target)
        return
    with quiet():
        from coremltools.optimize import coreml

        if weights == "int8":
            linear = coreml.OpLinearQuantizerConfig(
                mode="linear_symmetric",
                dtype="int8",
                granularity="per_channel",
                weight_threshold=MIN_COMPRESSED_SIZE,
            )
            made = coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=linear))
        else:
            lut_function = partial(palettize, bits=PALETTE_BITS[weights])
            chosen = coreml.OpPalettizerConfig(
                mode="custom", lut_function=lut_function, weight_threshold=MIN_COMPRESSED_SIZE
            )
            made = coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=chosen))
        _save(made, target)


def split_package(package: Path, folder: Path, *, names: tuple[str, str]) -> tuple[Path, Path]:
    """Cut a package in two of about half the weights each: `folder`/NAME.mlpackage, in their order.

    The second takes all outputs of the first, and what it needs of the whole's inputs, by name. The same
    package gives the same bytes.

    Raises:
        ValueError: if there is something at a target already, the package cannot be read or cut, or its
            weights are compressed: the halves are to be.
    """
    first, second = (folder / f"{name}.mlpackage" for name in names)
    for target in (first, second):
        _check_absent(target)
    model = _open(package)
    for target, specification in zip((first, second), split_program(model.get_spec()), strict=True):
        with quiet():
            import coremltools

            half = coremltools.convert(
                _load(specification, weights=model.weights_dir),
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS17,
                # It is as it shall be: each dtype and each operation.
                pass_pipeline=coremltools.PassPipeline.EMPTY,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
            _save(half, target)
    return first, second


def _save(model: Any, package: Path) -> None:  # noqa: ANN401 - coremltools has no types
    """Whole or not at all, without what differs from one time to the next."""
    model.user_defined_metadata.pop(_CONVERSION_DATE, None)
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        partial_package = Path(scratch) / package.name
        model.save(str(partial_package))
        for name in _DEBUG_FILES:
            (partial_package / name).unlink(missing_ok=True)
        _fix_identifiers(partial_package / "Manifest.json")
        partial_package.rename(package)


def _load(specification: Any, *, weights: str) -> Any:  # noqa: ANN401 - coremltools has no types
    from coremltools.converters.mil.frontend.milproto.load import load

    return load(specification, specification.specificationVersion, weights)


def _check_absent(package: Path) -> None:
    if package.exists():
        raise ValueError(f"{package} exists; a package is never written over")
    package.parent.mkdir(parents=True, exist_ok=True)


def _check_range(module: FixedModule) -> None:
    for name, tensor in module.network.state_dict().items():
        if tensor.is_floating_point() and not float(tensor.abs().max()) <= FLOAT16_MAX:
            raise ValueError(
                f"weight {name} of {module.name} holds {float(tensor.abs().max()):.6g}, "
                f"and float16 ends at {FLOAT16_MAX:g}; scale it, or compile for another runtime"
            )


def _tensor_type(coremltools: Any, port: Port) -> Any:  # noqa: ANN401 - coremltools has no types
    wide = np.float32 if port.name == TIMESTEP else np.float16
    dtype = np.int32 if port.kind == "int32" else wide
    return coremltools.TensorType(name=port.name, shape=port.shape, dtype=dtype)


def _fits_float16(op: Any) -> bool:  # noqa: ANN401 - coremltools has no types
    """Whether the operation may be computed in float16: whether no wave is computed from its result."""
    if op.op_type in SINUSOIDS:
        return False
    if op.op_type not in _BEFORE_SINUSOIDS:
        return True
    return all(_fits_float16(reader) for output in op.outputs for reader in output.child_ops)


def _fix_identifiers(manifest: Path) -> None:
    """Replace the random names of a package's items, so that the same module gives the same bytes."""
    text = manifest.read_text()
    for identifier, item in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(identifier, str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])))
    # The entries came in the order of their random names.
    manifest.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True) + "\n")


def describe_package(package: Path) -> CoreMLDescription:
    """Read a package back and say what it holds.

    Raises:
        ValueError: if it cannot be read, holds a weight that is not finite, or needs a system after iOS 17;
            by name.
    """
    program = read_program(package)
    specification = _open(package).get_spec()
    _check_target(program, version=int(specification.specificationVersion))
    _check_finite(program)
    exact = program.before(SINUSOIDS)
    wide_weights = {name for name, array in program.weights().items() if array.dtype != np.float16}
    wide_results = {value.name for value in program.results() if value.dtype == "float32"}
    waves = {operation.name for operation in program.operations if operation.kind in SINUSOIDS}
    return CoreMLDescription(
        inputs=_read_ports(specification.description.input),
        outputs=_read_ports(specification.description.output),
        specification_version=int(specification.specificationVersion),
        operations=dict(sorted(Counter(operation.kind for operation in program.operations).items())),
        weight_bytes=sum(path.stat().st_size for path in package.rglob("weight.bin")),
        float32_weights=tuple(sorted(wide_weights - exact)),
        float32_results=tuple(sorted(wide_results - exact - waves)),
    )


def _check_target(program: MilProgram, *, version: int) -> None:
    from coremltools import target
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    kinds = {operation.kind for operation in program.operations}
    later = sorted(kind for kind in kinds if target.iOS17 not in SSAOpRegistry.core_ops[kind])
    if later or version > IOS17_SPECIFICATION:
        what = f"operations {', '.join(later)}" if later else f"specification version {version}"
        raise ValueError(f"the package needs a system after iOS 17: {what}; it is to run on iOS 17")


def _check_finite(program: MilProgram) -> None:
    for name, array in program.weights().items():
        if not np.isfinite(array).all():
            raise ValueError(f"the package's weight {name} of shape {array.shape} holds values not finite")


def read_program(package: Path) -> MilProgram:
    """The package's program as data: every operation and constant, from the files on disk.

    Raises:
        ValueError: if the package cannot be read.
    """
    model = _open(package)
    with quiet():
        try:
            loaded = _load(model.get_spec(), weights=model.weights_dir)
        except Exception as error:
            raise ValueError(f"{package} is not a readable Core ML package: {error}") from error
    function = loaded.functions["main"]
    constants = {op.outputs[0].name: op.outputs[0].val for op in function.operations if op.op_type == "const"}
    return MilProgram(
        inputs=tuple(_value(var) for var in function.inputs.values()),
        outputs=tuple(_value(var) for var in function.outputs),
        constants=constants,
        operations=tuple(_operation(op) for op in function.operations if op.op_type != "const"),
    )


def check_weights(programs: MilProgram | Sequence[MilProgram], parameters: Mapping[str, Tensor]) -> float:
    """Find each matrix and kernel of the network among the programs' weights, rounded to float16.

    Vectors are left out: the converter folds constants into biases. A factor folded into a kernel is allowed
    for.

    Args:
        programs: one, or the chunks of one.
        parameters: of the network, by name.

    Returns:
        The largest error, relative to the largest weight of its tensor; below `WEIGHT_ERROR_LIMIT`.

    Raises:
        ParityError: naming the first tensor that is not there.
    """
    chunks = [programs] if isinstance(programs, MilProgram) else programs
    weights = defaultdict(list)
    for weight in (weight for chunk in chunks for weight in chunk.weights().values()):
        weights[weight.size].append(weight.ravel())
    worst = 0.0
    for name, tensor in parameters.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        wanted = tensor.detach().cpu().numpy().ravel()
        error = _least_error(weights[wanted.size], wanted=wanted)
        if not error <= WEIGHT_ERROR_LIMIT:
            raise ParityError(
                f"the Core ML program lacks the network's weight {name}: the nearest differs by {error:.3g} "
                f"of its largest value, and {WEIGHT_ERROR_LIMIT:.3g} is the limit"
            )
        worst = max(worst, error)
    return worst


def _least_error(weights: Sequence[np.ndarray], *, wanted: np.ndarray) -> float:
    # A full-size UNet has dozens of each size: the nearest is known by a few of its values.
    few = slice(None, None, max(1, wanted.size // _NUM_PROBES))
    ranked = sorted(weights, key=lambda found: _relative_error(found[few], wanted=wanted[few]))
    return min((_relative_error(found, wanted=wanted) for found in ranked[:1]), default=float("inf"))


def _relative_error(found: np.ndarray, *, wanted: np.ndarray) -> float:
    values, target = found.astype(np.float64), wanted.astype(np.float64)
    energy = float(target @ target)
    factor = float(values @ target) / energy if energy else 1.0
    largest = float(np.abs(factor * target).max())
    difference = float(np.abs(values - factor * target).max())
    return difference / largest if largest else difference


def float16_on_ios17() -> dict[str, Any]:
    """What another compiler must tell coremltools to get programs of the same kind."""
    with quiet():
        import coremltools

        return {
            "compute_precision": coremltools.precision.FLOAT16,
            "minimum_deployment_target": coremltools.target.iOS17,
        }


def open_packages(packages: Sequence[Path]) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """A module's packages as Core ML itself runs them, on its Neural Engine where it can: on a Mac alone.

    Raises:
        ValueError: if Core ML is not there, or does not load a package.
    """
    with quiet():
        import coremltools

        try:
            models = [
                coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_AND_NE)
                for path in packages
            ]
            first = [feature.name for feature in models[0].get_spec().description.input]
        except Exception as error:
            raise ValueError(f"Core ML does not load {packages[0].name}: {error}") from error

    def run(inputs: Sequence[np.ndarray]) -> np.ndarray:
        values = dict(zip(first, inputs, strict=True))
        made: dict[str, np.ndarray] = {}
        for model in models:
            wanted = [feature.name for feature in model.get_spec().description.input]
            made = model.predict({name: values[name] for name in wanted})
            values |= made
        return next(iter(made.values())).astype(np.float32)

    return run


def _open(package: Path) -> Any:  # noqa: ANN401 - coremltools has no types
    with quiet():
        import coremltools

        try:
            return coremltools.models.MLModel(str(package), skip_model_load=True)
        except Exception as error:
            raise ValueError(f"{package} is not a readable Core ML package: {error}") from error


def _read_ports(features: Any) -> tuple[CoreMLPort, ...]:  # noqa: ANN401 - a protobuf list
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
    return Operation(
        kind=op.op_type,
        inputs={argument: _names(given) for argument, given in op.inputs.items() if given is not None},
        outputs=tuple(_value(output) for output in op.outputs),
    )


def _names(given: Any) -> str | tuple[str, ...]:  # noqa: ANN401 - coremltools has no types
    return tuple(var.name for var in given) if isinstance(given, list | tuple) else str(given.name)


def _value(var: Any) -> Value:  # noqa: ANN401 - coremltools has no types
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    return Value(name=var.name, shape=tuple(var.shape), dtype=np.dtype(nptype_from_builtin(var.dtype)).name)
