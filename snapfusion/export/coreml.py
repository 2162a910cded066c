"""Compiles modules to Core ML packages for iOS 17 and later, compresses and splits packages."""

import json
import shutil
import tempfile
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snapfusion.export.coreml_package import SINUSOIDS, CoreMLObject, load_specification, open_package
from snapfusion.export.installed import check_installed
from snapfusion.export.mil import FLOAT16_MAX
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.palette import palettize
from snapfusion.export.quiet import quiet
from snapfusion.export.settings import CoreMLKind
from snapfusion.export.split_program import split_program

# Operations between the timestep and its sines and cosines; the search for them ends at any other kind.
_BEFORE_SINUSOIDS = ("mul", "expand_dims", "tile", "slice_by_index", "reshape", "cast")

PALETTE_BITS: dict[str, int] = {"palette-6": 6, "palette-8": 8}
"""Bits of an index."""

MIN_COMPRESSED_SIZE = 2048
"""Tensors of no more elements are not compressed: their palettes would be as large."""

# Identifiers for tools that trace a program back to its source; a phone has no use for them.
_DEBUG_FILE = "executorch_debug_handle_mapping.json"
_CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


def import_coremltools() -> None:
    """Import coremltools, which takes seconds."""
    with quiet():
        import coremltools.optimize.coreml  # noqa: F401


def compile_coreml(module: FixedModule, package: Path) -> None:
    """Write the module as an `.mlpackage` folder: an ML program with float16 weights and arithmetic.

    Ports have the dtypes that they state. Everything computed from a timestep up to its sines and cosines is
    float32: their angles reach 999, where float16 would round them by up to a quarter of a radian. That is
    five operations of a thousand.

    The same module gives the same bytes.

    Raises:
        ValueError: if `package` exists, or a weight is beyond float16.
    """
    check_installed("coremltools")
    check_absent(package)
    _check_range(module)
    with quiet():
        import coremltools

        model = coremltools.convert(
            # To ATen's core operations; coremltools does not know the training ones.
            module.trace().run_decompositions({}),
            inputs=[_tensor_type(port) for port in module.inputs],
            outputs=[coremltools.TensorType(name=port.name, dtype=_dtype(port)) for port in module.outputs],
            convert_to="mlprogram",
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.transform.FP16ComputePrecision(op_selector=_fits_float16),
            skip_model_load=True,
        )
        _save(model, package)


def compress_package(package: Path, target: Path, *, weights: CoreMLKind) -> None:
    """Write a copy of the package with compressed matrices and kernels; vectors are left as they are.

    iOS 17 supports one palette per tensor, and one scale per channel. The same package gives the same bytes.

    Args:
        package: with float16 weights; a program that is split is compressed half by half.
        target: the new package.
        weights: "palette-6" and "palette-8" give each tensor 64 or 256 values chosen by k-means, "int8" gives
            each output channel a scale for integers of -127 .. 127; "float16" is a copy.

    Raises:
        ValueError: if `target` exists, or the package cannot be read.
    """
    check_absent(target)
    model = open_package(package)
    if weights == "float16":
        shutil.copytree(package, target)
        return
    with quiet():
        from coremltools.optimize import coreml

        if weights == "int8":
            compress = coreml.linear_quantize_weights
            config = coreml.OpLinearQuantizerConfig(
                mode="linear_symmetric",
                dtype="int8",
                granularity="per_channel",
                weight_threshold=MIN_COMPRESSED_SIZE,
            )
        else:
            # coremltools' own k-means has random initial centers: the bytes would differ from run to run.
            palettizer = partial(palettize, bits=PALETTE_BITS[weights])
            compress = coreml.palettize_weights
            config = coreml.OpPalettizerConfig(
                mode="custom", lut_function=palettizer, weight_threshold=MIN_COMPRESSED_SIZE
            )
        _save(compress(model, coreml.OptimizationConfig(global_config=config)), target)


def split_package(package: Path, folder: Path, *, names: tuple[str, str]) -> tuple[Path, Path]:
    """Split a package into two of about half the weights each: `folder`/NAME.mlpackage, in their order.

    The second takes by name all outputs of the first, and those inputs of the whole that it needs. The same
    package gives the same bytes.

    Raises:
        ValueError: if a target exists, the package cannot be read or split, or its weights are compressed
            (compress the halves instead).
    """
    first, second = (folder / f"{name}.mlpackage" for name in names)
    for target in (first, second):
        check_absent(target)
    model = open_package(package)
    for target, specification in zip((first, second), split_program(model.get_spec()), strict=True):
        with quiet():
            import coremltools

            half = coremltools.convert(
                load_specification(specification, weights=model.weights_dir),
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS17,
                # Without passes: dtypes and operations must stay as they are.
                pass_pipeline=coremltools.PassPipeline.EMPTY,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
            _save(half, target)
    return first, second


def _save(model: CoreMLObject, package: Path) -> None:
    """Write the package atomically, without dates and random names."""
    model.user_defined_metadata.pop(_CONVERSION_DATE, None)
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        partial_package = Path(scratch) / package.name
        model.save(str(partial_package))
        (partial_package / _DEBUG_FILE).unlink(missing_ok=True)
        _fix_identifiers(partial_package / "Manifest.json")
        _fix_order(partial_package, type(model.get_spec()))
        partial_package.rename(package)


def _fix_identifiers(manifest: Path) -> None:
    """Replace the random names of a package's items, so that the same module gives the same bytes."""
    text = manifest.read_text()
    for identifier, item in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(identifier, str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])))
    # Sorted, because the entries are in the order of their random names.
    manifest.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True) + "\n")


def _fix_order(package: Path, message: type[CoreMLObject]) -> None:
    """Order the entries of the specification's maps; protobuf writes them in any order in each process."""
    for file in package.rglob("*.mlmodel"):
        file.write_bytes(message.FromString(file.read_bytes()).SerializeToString(deterministic=True))


def check_absent(package: Path) -> None:
    """Check that there is no such package yet, and make the folder that it is to be in.

    Raises:
        ValueError: if `package` exists.
    """
    if package.exists():
        raise ValueError(f"{package} exists; packages are not overwritten: remove it, or give another path")
    package.parent.mkdir(parents=True, exist_ok=True)


def _check_range(module: FixedModule) -> None:
    for name, tensor in module.network.state_dict().items():
        # The negation also catches NaN.
        if tensor.is_floating_point() and not float(tensor.abs().max()) <= FLOAT16_MAX:
            raise ValueError(
                f"weight {name} of {module.name} holds {float(tensor.abs().max()):.6g}, "
                f"and float16 ends at {FLOAT16_MAX:g}; scale it, or compile for another runtime"
            )


def _tensor_type(port: Port) -> CoreMLObject:
    import coremltools

    return coremltools.TensorType(name=port.name, shape=port.shape, dtype=_dtype(port))


def _dtype(port: Port) -> type[np.generic]:
    dtypes: dict[str, type[np.generic]] = {"float16": np.float16, "float32": np.float32, "int32": np.int32}
    return dtypes["int32" if port.kind == "int32" else port.coreml]


def _fits_float16(op: CoreMLObject) -> bool:
    """Whether an operation may be computed in float16: no sine or cosine depends on its result."""
    if op.op_type in SINUSOIDS:
        return False
    if op.op_type not in _BEFORE_SINUSOIDS:
        return True
    return all(_fits_float16(reader) for output in op.outputs for reader in output.child_ops)


def float16_on_ios17() -> dict[str, Any]:
    """Options of ExecuTorch's Core ML delegate for the same precision and target."""
    import coremltools

    return {
        "compute_precision": coremltools.precision.FLOAT16,
        "minimum_deployment_target": coremltools.target.iOS17,
    }
