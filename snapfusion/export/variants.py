"""Variants of a bundle: the same three modules by one runtime and with one kind of weights.

Each variant is a folder in the bundle. A module is compiled, written, and read back from disk as a function
that computes what the file contains: ExecuTorch programs and ONNX models are executed, Core ML packages
evaluated operation by operation with their compressed weights.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from snapfusion.export.bundle import COREML, EXECUTORCH, EXECUTORCH_COREML, ONNX_RUNTIME
from snapfusion.export.coreml import compile_coreml, compress_package, split_package
from snapfusion.export.coreml_package import (
    CoreMLDescription,
    check_weights,
    describe_package,
    read_program,
)
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch, extract_package
from snapfusion.export.loop import RunModule
from snapfusion.export.mil import MaxAbsObserver, evaluate
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.onnx import convert_onnx, count_operations, export_onnx, weights_path
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.export.parity import ParityError
from snapfusion.export.settings import AttentionLayout, CoreMLKind, ExecuTorchKind, MobileSettings, OnnxKind

_EXECUTED = {EXECUTORCH: "executed in ExecuTorch's runtime", ONNX_RUNTIME: "executed in ONNX Runtime"}
_WIDENED = ", which computes in float32 where its CPU kernels take no float16"
_EVALUATED = "read back and evaluated with torch, each result rounded to the dtype it states"


@dataclass(frozen=True)
class BundleVariant:
    """One runtime with one kind of weights.

    Attributes:
        name: of its folder.
        runtime: as the manifest names it.
        kind: as the settings name it.
        weights: in words.
    """

    name: str
    runtime: str
    kind: str
    weights: str

    @property
    def exact(self) -> bool:
        """Whether each module must reach the float limit; otherwise only images count, at a lower limit."""
        return self.kind in ("float32", "float16", "coreml")

    @property
    def measured(self) -> str:
        """Description of how the outputs of its files are computed on this machine."""
        if self.runtime == ONNX_RUNTIME and self.kind == "float16":
            return _EXECUTED[ONNX_RUNTIME] + _WIDENED
        return _EXECUTED.get(self.runtime, _EVALUATED)


_EXECUTORCH_VARIANTS = (
    BundleVariant("executorch", EXECUTORCH, "float32", "XNNPACK, float32"),
    BundleVariant("executorch-int8", EXECUTORCH, "int8", "XNNPACK, 8-bit weights"),
    BundleVariant("executorch-coreml", EXECUTORCH_COREML, "coreml", "Core ML delegate, float16"),
)
_COREML_VARIANTS = (
    BundleVariant("coreml", COREML, "float16", "float16"),
    BundleVariant("coreml-6bit", COREML, "palette-6", "palettes of 6 bits"),
    BundleVariant("coreml-8bit", COREML, "palette-8", "palettes of 8 bits"),
    BundleVariant("coreml-int8", COREML, "int8", "8 bits, linear a channel"),
)
_ONNX_VARIANTS = (
    BundleVariant("onnx", ONNX_RUNTIME, "float32", "float32"),
    BundleVariant("onnx-float16", ONNX_RUNTIME, "float16", "float16"),
    BundleVariant("onnx-int8", ONNX_RUNTIME, "int8", "8-bit matrices, float32 convolutions"),
)


def variants_of(settings: MobileSettings) -> list[BundleVariant]:
    """The variants that the settings name, in their order."""
    named = (
        (_EXECUTORCH_VARIANTS, settings.executorch),
        (_COREML_VARIANTS, settings.coreml),
        (_ONNX_VARIANTS, settings.onnx),
    )
    return [
        variant for variants, kinds in named for kind in kinds for variant in variants if variant.kind == kind
    ]


def groups_of(variants: Sequence[BundleVariant]) -> list[list[BundleVariant]]:
    """The variants, those together that are made from the same file; the longest to compile first."""
    alone = [[variant] for variant in variants if variant.runtime not in (COREML, ONNX_RUNTIME)]
    coreml, onnx = (
        [variant for variant in variants if variant.runtime == runtime] for runtime in (COREML, ONNX_RUNTIME)
    )
    # 8-bit XNNPACK programs call a delegate for each convolution, which takes twice as long as all others.
    quantized = [group for group in alone if group[0].kind == "int8"]
    shared = [group for group in (coreml, onnx) if group]
    return [*quantized, *shared, *(group for group in alone if group not in quantized)]


def layout_of(variant: BundleVariant, settings: MobileSettings) -> AttentionLayout:
    """The layout of its UNet's attention."""
    return "diffusers" if variant.runtime in (EXECUTORCH, ONNX_RUNTIME) else settings.attention


@dataclass(frozen=True, kw_only=True)
class CompiledModule:
    """A module's files and the function that they compute.

    Attributes:
        files: the program, or the packages in their order, relative to the bundle's folder.
        run: computes what the files contain.
        record: entries of the manifest besides size and parity, as plain JSON values.
        record_after: further entries, available after the module has run.
    """

    files: tuple[str, ...]
    run: RunModule
    record: Mapping[str, Any]
    record_after: Callable[[], Mapping[str, Any]] = dict


def compile_module(
    variant: BundleVariant, module: FixedModule, folder: Path, *, scratch: Path, chunk_bytes: int
) -> CompiledModule:
    """Compile a module of a variant into the bundle's `folder`.

    Args:
        variant: runtime and kind of weights.
        module: to compile.
        folder: of the bundle.
        scratch: a folder for what several variants are made from.
        chunk_bytes: a larger float16 package is split in two.

    Raises:
        ParityError: if the files do not state what the module is.
    """
    ports = {"inputs": _by_name(module.inputs), "outputs": _by_name(module.outputs)}
    if variant.runtime == ONNX_RUNTIME:
        return _compile_onnx(variant, module, folder, scratch=scratch, ports=ports)
    if variant.runtime != COREML:
        file = folder / variant.name / f"{module.name}.pte"
        file.write_bytes(compile_executorch(module, kind=cast(ExecuTorchKind, variant.kind)))
        return CompiledModule(
            files=(f"{variant.name}/{file.name}",), run=open_module(variant, [file]), record=ports
        )
    packages = _packages(module, scratch=scratch, chunk_bytes=chunk_bytes)
    paths = [folder / variant.name / package.name for package in packages]
    for package, path in zip(packages, paths, strict=True):
        compress_package(package, path, weights=cast(CoreMLKind, variant.kind))
    programs = [read_program(path) for path in paths]
    descriptions = [describe_package(path) for path in paths]
    check_descriptions(module, descriptions)
    record: dict[str, Any] = {**ports, "packages": [asdict(description) for description in descriptions]}
    if variant.exact:
        record["max_weight_error"] = check_weights(programs, module.network.state_dict())
    observer = MaxAbsObserver()
    return CompiledModule(
        files=tuple(path.relative_to(folder).as_posix() for path in paths),
        run=partial(evaluate, programs, observe=observer),
        record=record,
        record_after=observer.to_values,
    )


def _compile_onnx(
    variant: BundleVariant, module: FixedModule, folder: Path, *, scratch: Path, ports: Mapping[str, Any]
) -> CompiledModule:
    source = scratch / f"{module.name}.onnx"
    if not source.exists():
        export_onnx(module, source)
    file = folder / variant.name / source.name
    convert_onnx(source, file, kind=cast(OnnxKind, variant.kind))
    files = [path for path in (file, weights_path(file)) if path.exists()]
    return CompiledModule(
        files=tuple(path.relative_to(folder).as_posix() for path in files),
        run=open_module(variant, files),
        record={**ports, "operations": count_operations(file)},
    )


def open_module(variant: BundleVariant, paths: Sequence[Path]) -> RunModule:
    """The function that a module's files compute: its program, or its packages in their order."""
    if variant.runtime == EXECUTORCH:
        return ExecuTorchProgram(paths[0])
    if variant.runtime == ONNX_RUNTIME:
        return OnnxProgram(paths[0])
    if variant.runtime == EXECUTORCH_COREML:
        return _evaluate_delegated(paths[0])
    # Observed, because a result that is not finite is refused.
    return partial(evaluate, [read_program(path) for path in paths], observe=MaxAbsObserver())


def _evaluate_delegated(file: Path) -> RunModule:
    """Evaluate the Core ML package that the program contains: its delegate runs on Apple's systems only."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        package = Path(scratch) / f"{file.stem}.mlpackage"
        extract_package(file, package)
        return partial(evaluate, read_program(package))


def _packages(module: FixedModule, *, scratch: Path, chunk_bytes: int) -> Sequence[Path]:
    """The module's float16 package in `scratch`, or its halves; compiled once for all variants."""
    whole = scratch / f"{module.name}.mlpackage"
    if not whole.exists():
        compile_coreml(module, whole)
    if total_bytes(whole) <= chunk_bytes:
        return [whole]
    names = (f"{module.name}-1", f"{module.name}-2")
    halves = [scratch / f"{name}.mlpackage" for name in names]
    return halves if halves[0].exists() else split_package(whole, scratch, names=names)


def check_descriptions(module: FixedModule, packages: Sequence[CoreMLDescription]) -> None:
    """Compare the descriptions of packages with the module that they were compiled from.

    Raises:
        ParityError: if a port differs, or anything but the timestep's embedding is float32.
    """
    for side in ("inputs", "outputs"):
        stated = {port.name: port.shape for package in packages for port in getattr(package, side)}
        for port in getattr(module, side):
            if stated.get(port.name) != port.shape:
                raise ParityError(
                    f"the Core ML packages of {module.name} state {port.name} as {stated.get(port.name)} "
                    f"among their {side}; it is {port.shape}"
                )
    for package in packages:
        if wide := package.float32_results + package.float32_weights:
            raise ParityError(
                f"a Core ML package of {module.name} has {len(wide)} weights or results in float32 that "
                f"should be float16, for example {wide[0]}"
            )


def total_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a package."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _by_name(ports: Sequence[Port]) -> dict[str, Any]:
    # A `.pte` has no names for its inputs: their position counts, and readers of JSON may not keep the order.
    return {
        port.name: {"position": position, "shape": list(port.shape), "kind": port.kind}
        for position, port in enumerate(ports)
    }
