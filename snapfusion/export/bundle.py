"""A mobile bundle on disk: one model as compiled programs, with everything an application needs beside them.

manifest.json      contents and origin: every file's size and SHA-256, shapes, versions, parity
MODEL_CARD.md      intended use, and the licences of the teacher's weights and of the data
LICENCE            the licence's text, where it must accompany the weights
sampler.json       coefficients of the steps (`snapfusion.export.sampler_coefficients`)
tokenizer/         as transformers saves it
vectors/           test vectors (`snapfusion.export.vectors`)
pictures/          images of the reference captions by torch and by each variant
executorch*/       text_encoder.pte, unet.pte, decoder.pte
coreml*/           text_encoder.mlpackage, unet.mlpackage (or unet-1, unet-2), decoder.mlpackage
onnx*/             text_encoder.onnx, unet.onnx, decoder.onnx; above 2 GB with its weights in NAME.onnx.data
web/               with ONNX models, a page that draws by them in a browser (`snapfusion.export.web_page`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from snapfusion.export.bundle_files import BundleError, verify_files
from snapfusion.export.executorch import ExecuTorchProgram
from snapfusion.export.installed import NotInstalledError
from snapfusion.export.loop import CompiledModel, RunModule
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.vectors import Vectors, read_vectors
from snapfusion.records import parse_record

CARD, LICENCE, SAMPLER = "MODEL_CARD.md", "LICENCE", "sampler.json"
TOKENIZER, VECTORS = "tokenizer", "vectors"
SAFETY_CHECKER = "safety_checker.pte"
EXECUTORCH, COREML, EXECUTORCH_COREML = "ExecuTorch", "Core ML", "ExecuTorch on Core ML"
ONNX_RUNTIME = "ONNX Runtime"
"""Runtimes, as the manifest names them."""
EXECUTED_HERE: dict[str, Callable[[Path], RunModule]] = {
    EXECUTORCH: ExecuTorchProgram,
    ONNX_RUNTIME: OnnxProgram,
}
"""What opens a program, for each runtime that runs on any machine."""
MODULES = ("text_encoder", "unet", "decoder")


@dataclass(frozen=True, kw_only=True)
class MobileBundle:
    """A bundle whose files match its manifest.

    Attributes:
        folder: of the bundle.
        manifest: content of manifest.json.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @cached_property
    def sampler(self) -> SamplerCoefficients:
        """The sampler's coefficients; raises BundleError if they are inconsistent."""
        return read_sampler(self.folder)

    @cached_property
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
        """Names of the variants of one runtime."""
        return [name for name, entry in self.manifest["variants"].items() if entry["runtime"] == runtime]

    def files(self, variant: str, module: str) -> list[Path]:
        """Paths of a module's program, or of its packages in their order.

        Raises:
            BundleError: if there is no such variant.
        """
        if variant not in self.manifest["variants"]:
            known = ", ".join(self.manifest["variants"])
            raise BundleError(f"{self.folder} has no variant {variant!r}; {known} are available")
        return [self.folder / name for name in self.manifest["variants"][variant]["modules"][module]["files"]]

    def programs(self, variant: str) -> CompiledModel:
        """Open a variant's programs in ExecuTorch or ONNX Runtime.

        Raises:
            BundleError: if there is no such variant, or this machine cannot run it.
            NotInstalledError: if its runtime is not installed.
        """
        paths = {module: self.files(variant, module)[0] for module in MODULES}
        runtime = self.manifest["variants"][variant]["runtime"]
        if runtime not in EXECUTED_HERE:
            accepted = " or ".join(EXECUTED_HERE)
            raise BundleError(f"{self.folder} has {variant} for {runtime}; {accepted} runs here")
        programs = {}
        for module, path in paths.items():
            try:
                programs[module] = EXECUTED_HERE[runtime](path)
            except NotInstalledError:
                raise
            except ValueError as error:
                raise BundleError(f"{path}: {error}") from None
        return CompiledModel(**programs, conditions=self.manifest["conditions"])

    @cached_property
    def safety_checker(self) -> ExecuTorchProgram | None:
        """The program that marks images that must not be shown, if the bundle has one."""
        name = self.manifest["safety_checker"]
        return ExecuTorchProgram(self.folder / name) if name else None


def read_sampler(folder: Path) -> SamplerCoefficients:
    """Read a bundle's `sampler.json`.

    Raises:
        BundleError: if it is missing or its coefficients are inconsistent.
    """
    try:
        return SamplerCoefficients.parse(parse_record((folder / SAMPLER).read_bytes(), name=SAMPLER))
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder / SAMPLER}: {error}") from None


def open_bundle(folder: Path) -> MobileBundle:
    """Open a bundle after comparing every file with the manifest.

    Raises:
        BundleError: if it is no bundle, of another version, a file is missing, altered or added, or one lies
            outside the folder.
    """
    return MobileBundle(folder=folder, manifest=verify_files(folder))
