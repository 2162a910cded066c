"""A mobile bundle on disk: one model as programs, with all that an application needs beside them.

manifest.json      what it is made of and from, every file's size and SHA-256, shapes, versions, parity
MODEL_CARD.md      what it is for, and the licences of the teacher's weights and of the data
LICENCE            the licence's text, where it asks to be handed on
sampler.json       the steps as numbers (`snapfusion.export.sampler_coefficients`)
tokenizer/         as transformers saves it
vectors/           test vectors (`snapfusion.export.vectors`)
pictures/          the captions of the gate as torch and as each variant drew them
executorch*/       text_encoder.pte, unet.pte, decoder.pte
coreml*/           text_encoder.mlpackage, unet.mlpackage (or unet-1, unet-2), decoder.mlpackage
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from snapfusion.export.executorch import ExecuTorchProgram
from snapfusion.export.loop import CompiledModel
from snapfusion.export.sampler_coefficients import SamplerCoefficients, SamplerError
from snapfusion.export.vectors import Vectors, read_vectors
from snapfusion.models.checksums import file_hash

FORMAT_VERSION = 2
MANIFEST, CARD, LICENCE, SAMPLER = "manifest.json", "MODEL_CARD.md", "LICENCE", "sampler.json"
TOKENIZER, VECTORS, IMAGES = "tokenizer", "vectors", "pictures"
SAFETY_CHECKER = "safety_checker.pte"
EXECUTORCH, COREML, EXECUTORCH_COREML = "ExecuTorch", "Core ML", "ExecuTorch on Core ML"
"""The runtimes."""
MODULES = ("text_encoder", "unet", "decoder")


class BundleError(ValueError):
    """A bundle that is missing, of another version, incomplete or altered; says which file."""


@dataclass(frozen=True, kw_only=True)
class MobileBundle:
    """A bundle whose files are those of its manifest.

    Attributes:
        folder: where it lies.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def steps(self) -> SamplerCoefficients:
        """The sampler's numbers; raises BundleError if they are not in order."""
        return read_sampler(self.folder)

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer."""
        return CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)

    @property
    def vectors(self) -> Vectors:
        """The test vectors."""
        return read_vectors(self.folder / VECTORS)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, h, w)."""
        channels, height, width = self.manifest["latent_shape"]
        return channels, height, width

    def variants(self, *, runtime: str) -> list[str]:
        """The variants of one runtime."""
        return [name for name, told in self.manifest["variants"].items() if told["runtime"] == runtime]

    def files(self, variant: str, module: str) -> list[Path]:
        """A module's program, or its packages in their order.

        Raises:
            BundleError: if there is no such variant.
        """
        if variant not in self.manifest["variants"]:
            known = ", ".join(self.manifest["variants"])
            raise BundleError(f"{self.folder} has no variant {variant!r}; {known} are there")
        return [self.folder / name for name in self.manifest["variants"][variant]["modules"][module]["files"]]

    def programs(self, variant: str) -> CompiledModel:
        """A variant's ExecuTorch programs, opened.

        Raises:
            BundleError: if there is no such variant, or this machine cannot run it.
        """
        opened = {}
        if self.manifest["variants"].get(variant, {}).get("runtime", EXECUTORCH) != EXECUTORCH:
            raise BundleError(f"{self.folder} has no {EXECUTORCH} programs called {variant}")
        for module in MODULES:
            (path,) = self.files(variant, module)
            try:
                opened[module] = ExecuTorchProgram(path)
            except ValueError as error:
                raise BundleError(f"{path}: {error}") from None
        return CompiledModel(**opened, conditions=self.manifest["conditions"])

    def safety_checker(self) -> ExecuTorchProgram | None:
        """The program that says which pictures are not to be shown, if the bundle has one."""
        named = self.manifest["safety_checker"]
        return ExecuTorchProgram(self.folder / named) if named else None


def read_sampler(folder: Path) -> SamplerCoefficients:
    """The numbers in a bundle's `sampler.json`.

    Raises:
        BundleError: if they are not there or do not belong together.
    """
    try:
        return SamplerCoefficients.parse(json.loads((folder / SAMPLER).read_text()))
    except (OSError, ValueError) as error:
        # StepsError is a ValueError, and so is what json raises.
        said = str(error) if isinstance(error, SamplerError) else f"cannot be read: {error}"
        raise BundleError(f"{folder / SAMPLER}: {said}") from None


def open_bundle(folder: Path) -> MobileBundle:
    """The bundle in `folder`, once every file is what the manifest says.

    Raises:
        BundleError: if it is no bundle, of another version, or a file is missing, altered or added.
    """
    manifest = _manifest(folder)
    stated = manifest["files"]
    found = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    del found[MANIFEST]
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            raise BundleError(f"{folder}: {name} is missing; copy the bundle again")
        if name not in stated:
            raise BundleError(f"{folder}: {name} is not in the manifest: it was added to the bundle")
        if (
            found[name].stat().st_size != stated[name]["bytes"]
            or file_hash(found[name]) != stated[name]["sha256"]
        ):
            raise BundleError(f"{folder}: {name} was altered: it is not the file that the manifest describes")
    return MobileBundle(folder=folder, manifest=manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError:
        raise BundleError(f"{folder} has no {MANIFEST}: it is not a mobile bundle") from None
    except ValueError as error:
        raise BundleError(f"{folder}: {MANIFEST} is not JSON: {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} is a bundle of format {version}; format {FORMAT_VERSION} is accepted here: compile it "
            "again, or use the release that made it"
        )
    return manifest
