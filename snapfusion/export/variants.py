"""The variants of a bundle: the same three modules by one runtime and with one kind of weights.

Each variant is a folder in the bundle. A module is compiled, written, read back from the disk, and handed
over as something that computes what the file holds: ExecuTorch programs are executed, Core ML packages
evaluated operation by operation, compressed weights taken as what they stand for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from snapfusion.export.bundle import COREML, EXECUTORCH, EXECUTORCH_COREML
from snapfusion.export.coreml import (
    CoreMLDescription,
    check_weights,
    compile_coreml,
    compress_package,
    describe_package,
    read_program,
    split_package,
)
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch, extract_package
from snapfusion.export.loop import RunModule
from snapfusion.export.mil import MaxAbsObserver, evaluate, evaluate_chain
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.parity import ParityError
from snapfusion.export.settings import AttentionLayout, CoreMLKind, ExecuTorchKind, MobileSettings

# Of each kind, the variant's name and its weights in words.
_EXECUTORCH: dict[ExecuTorchKind, tuple[str, str]] = {
    "float32": ("executorch", "XNNPACK, float32"),
    "int8": ("executorch-int8", "XNNPACK, 8-bit weights"),
    "coreml": ("executorch-coreml", "Core ML delegate, float16"),
}
_COREML: dict[CoreMLKind, tuple[str, str]] = {
    "float16": ("coreml", "float16"),
    "palette-6": ("coreml-6bit", "palettes of 6 bits"),
    "palette-8": ("coreml-8bit", "palettes of 8 bits"),
    "int8": ("coreml-int8", "8 bits, linear a channel"),
}


@dataclass(frozen=True, kw_only=True)
class CompiledModule:
    """A compiled module.

    Attributes:
        files: the program, or the packages in their order, from the bundle's folder.
        run: computes what the files hold.
        told: what is said of it beside its size and parity, as plain JSON values.
        after: what else is known once it has run, likewise.
    """

    files: tuple[str, ...]
    run: RunModule
    told: Mapping[str, Any]
    after: Callable[[], Mapping[str, Any]] = dict


CompileModule = Callable[[FixedModule, Path], CompiledModule]
"""(module, the bundle's folder) -> what was written there."""


@dataclass(frozen=True, kw_only=True)
class BundleVariant:
    """One runtime, one kind of weights.

    Attributes:
        name: of its folder.
        runtime: "ExecuTorch" or "Core ML".
        weights: in words.
        form: of attention.
        exact: whether each module is held to the float limit; else the images alone, to another.
        measured: how what the files compute was found out, in words.
        compile: makes a module.
    """

    name: str
    runtime: str
    weights: str
    form: AttentionLayout
    exact: bool
    measured: str
    compile: CompileModule


def variants_of(settings: MobileSettings, *, scratch: Path) -> list[BundleVariant]:
    """Those that are asked for; `scratch` is a folder for packages that are compressed further."""
    return [
        *(_executorch(kind, settings=settings) for kind in settings.executorch),
        *(_coreml(kind, settings=settings, scratch=scratch) for kind in settings.coreml),
    ]


_EVALUATED = "read back and evaluated with torch, each result rounded to the dtype it states"


def _executorch(kind: ExecuTorchKind, *, settings: MobileSettings) -> BundleVariant:
    name, weights = _EXECUTORCH[kind]
    how: dict[str, Any] = {"delegate": "coreml"} if kind == "coreml" else {"weights": kind}

    def compile_(module: FixedModule, folder: Path) -> CompiledModule:
        file = f"{name}/{module.name}.pte"
        (folder / file).write_bytes(compile_executorch(module, **how))
        run = _extracted(folder / file) if kind == "coreml" else ExecuTorchProgram(folder / file)
        return CompiledModule(files=(file,), run=run, told=_ports(module))

    return BundleVariant(
        name=name,
        runtime=EXECUTORCH_COREML if kind == "coreml" else EXECUTORCH,
        weights=weights,
        form=settings.attention if kind == "coreml" else "diffusers",
        exact=kind != "int8",
        measured=_EVALUATED if kind == "coreml" else "executed in ExecuTorch's runtime",
        compile=compile_,
    )


def _extracted(file: Path) -> RunModule:
    """What Core ML's delegate would compute: the package that the program holds, evaluated."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        package = Path(scratch) / f"{file.stem}.mlpackage"
        extract_package(file, package)
        return partial(evaluate, read_program(package))


def _coreml(kind: CoreMLKind, *, settings: MobileSettings, scratch: Path) -> BundleVariant:
    name, weights = _COREML[kind]

    def compile_(module: FixedModule, folder: Path) -> CompiledModule:
        files = _packages(module, folder / name, kind=kind, scratch=scratch, chunk_bytes=settings.chunk_bytes)
        programs = [read_program(path) for path in files]
        described = [describe_package(path) for path in files]
        check_descriptions(module, described)
        told: dict[str, Any] = {
            **_ports(module),
            "packages": [package.to_values() for package in described],
        }
        if kind == "float16":
            told["max_weight_error"] = check_weights(programs, module.network.state_dict())
        extremes = MaxAbsObserver()
        return CompiledModule(
            files=tuple(path.relative_to(folder).as_posix() for path in files),
            run=partial(evaluate_chain, programs, observe=extremes),
            told=told,
            after=extremes.to_values,
        )

    return BundleVariant(
        name=name,
        runtime=COREML,
        weights=weights,
        form=settings.attention,
        exact=kind == "float16",
        measured=_EVALUATED,
        compile=compile_,
    )


def check_descriptions(module: FixedModule, packages: Sequence[CoreMLDescription]) -> None:
    """Hold what packages say of themselves to the module that they were made of.

    Raises:
        ParityError: if the module's ports are not theirs, or something but the waves of time is float32.
    """
    for what, ports in (("inputs", module.inputs), ("outputs", module.outputs)):
        wanted = {port.name: port.shape for port in ports}
        stated = {port.name: port.shape for package in packages for port in getattr(package, what)}
        for name, shape in wanted.items():
            if stated.get(name) != shape:
                raise ParityError(
                    f"the Core ML packages of {module.name} state {name} as {stated.get(name)} among their "
                    f"{what}; it is {shape}"
                )
    for package in packages:
        if wide := package.float32_results + package.float32_weights:
            raise ParityError(
                f"a Core ML package of {module.name} computes {len(wide)} things in float32 that were to be "
                f"float16, for example {wide[0]}"
            )


def _packages(
    module: FixedModule, folder: Path, *, kind: CoreMLKind, scratch: Path, chunk_bytes: int
) -> list[Path]:
    """The module's packages below `folder`; each half of a large one is compressed by itself."""
    whole = scratch / f"{module.name}.mlpackage"
    if not whole.exists():
        compile_coreml(module, whole)
    halves = [whole]
    if total_bytes(whole) > chunk_bytes:
        names = (f"{module.name}-1", f"{module.name}-2")
        halves = [scratch / f"{half}.mlpackage" for half in names]
        if not halves[0].exists():
            split_package(whole, scratch, names=names)
    for half in halves:
        compress_package(half, folder / half.name, weights=kind)
    return [folder / half.name for half in halves]


def total_bytes(place: Path) -> int:
    """Bytes of a file, or of all files of a package."""
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())


def _ports(module: FixedModule) -> dict[str, Any]:
    return {"inputs": _described(module.inputs), "outputs": _described(module.outputs)}


def _described(ports: Sequence[Port]) -> dict[str, Any]:
    # A program has no names for its inputs: their order counts, which a reader of JSON may lose.
    return {
        port.name: {"position": position, "shape": list(port.shape), "kind": port.kind}
        for position, port in enumerate(ports)
    }
