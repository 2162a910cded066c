"""Work of one process: the compilation of a module, or the images of a variant."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from snapfusion.export.bundle import MODULES, TOKENIZER, read_sampler
from snapfusion.export.layout import IMAGES
from snapfusion.export.loop import CompiledModel, generate, to_uint8_image
from snapfusion.export.modules import FixedModule
from snapfusion.export.parity import check_parity
from snapfusion.export.reference import Reference, samples_of
from snapfusion.export.settings import AttentionLayout, MobileSettings
from snapfusion.export.variants import BundleVariant, compile_module, layout_of, open_module, total_bytes
from snapfusion.models.tokenizer import tokenize


@dataclass(frozen=True, kw_only=True)
class UnitInputs:
    """Values that units share, too large to be sent to each process.

    Attributes:
        modules: by layout of attention and name.
        references: torch's result for each caption.
    """

    modules: Mapping[AttentionLayout, Mapping[str, FixedModule]]
    references: Sequence[Reference]

    def write(self, path: Path) -> None:
        """Write them into a file, each weight once."""
        with path.open("wb") as file:
            try:
                torch.save(self, file)
            except RuntimeError as error:
                # torch hides the system's error, for example of a full disk, behind its own.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    @classmethod
    def read(cls, path: Path) -> "UnitInputs":
        """Read them back; weights are mapped into memory, which processes share."""
        # Written by this program a moment ago, in a folder of its own.
        inputs: UnitInputs = torch.load(path, mmap=True, weights_only=False)
        return inputs


@dataclass(frozen=True, kw_only=True)
class UnitBuilder:
    """Builds units of a bundle.

    Attributes:
        folder: of the bundle.
        scratch: a folder for packages before compression.
        inputs: file of the `UnitInputs`.
        settings: limits and overrides.
    """

    folder: Path
    scratch: Path
    inputs: Path
    settings: MobileSettings

    def compile(self, name: str, variants: Sequence[BundleVariant]) -> dict[str, dict[str, Any]]:
        """Compile a module for some variants, and compare each with torch.

        Returns:
            The module's entry in the manifest for each variant, by the variant's name.

        Raises:
            ParityError: if one is below its limit and has no override.
        """
        inputs = UnitInputs.read(self.inputs)
        return {variant.name: self._compile_variant(variant, name, inputs) for variant in variants}

    def _compile_variant(self, variant: BundleVariant, name: str, inputs: UnitInputs) -> dict[str, Any]:
        """Its entry; the model that it opens is closed at the end, before another takes as much memory."""
        settings = self.settings
        samples = samples_of(inputs.references, module=name, conditions=settings.conditions)
        (self.folder / variant.name).mkdir(exist_ok=True)
        module = inputs.modules[layout_of(variant, settings)][name]
        compiled = compile_module(
            variant, module, self.folder, scratch=self.scratch, chunk_bytes=settings.chunk_bytes
        )
        parity = check_parity(
            artifact=f"{variant.name}/{name}",
            outputs=[compiled.run(arrays) for arrays, _ in samples],
            references=[output for _, output in samples],
            # Compressed weights are compared by their images; here only non-finite outputs are refused.
            limit_db=settings.parity_limit_db if variant.exact else 0.0,
            override=settings.override.get(variant.name),
        )
        return {
            "files": list(compiled.files),
            "bytes": sum(total_bytes(self.folder / file) for file in compiled.files),
            **compiled.record,
            "parity": asdict(parity),
            **compiled.record_after(),
        }

    def generate(self, variant: BundleVariant, *entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Generate the captions' images with a variant's files, and compare them with torch's.

        Args:
            variant: whose files.
            entries: the result of `compile` for each of `MODULES`.

        Returns:
            Their parity, for the manifest.

        Raises:
            ParityError: if one is below its limit and has no override.
        """
        references, settings = UnitInputs.read(self.inputs).references, self.settings
        runs = {
            name: open_module(variant, [self.folder / file for file in entry[variant.name]["files"]])
            for name, entry in zip(MODULES, entries, strict=True)
        }
        model = CompiledModel(**runs, conditions=settings.conditions)
        # Read from disk, as an application does, so that an error in either file shows in the images.
        sampler, tokenizer = read_sampler(self.folder), CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)
        images = []
        for reference in references:
            ids = tokenize(tokenizer, ["", reference.caption]).numpy().astype(np.int32)
            drawing: dict[str, Any] = {"noise": reference.noise, "fresh_noise": reference.fresh_noise}
            images.append(generate(model, ids=ids, sampler=sampler, w=settings.guidance, **drawing))
        parity = check_parity(
            artifact=f"the images of {variant.name}",
            outputs=images,
            references=[reference.image for reference in references],
            limit_db=settings.parity_limit_db if variant.exact else settings.quantized_limit_db,
            override=settings.override.get(variant.name),
        )
        write_images(self.folder, variant.name, images)
        return asdict(parity)


def write_images(folder: Path, name: str, images: Sequence[np.ndarray]) -> None:
    """Write images into the bundle as PNG files that begin with `name`."""
    (folder / IMAGES).mkdir(exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(to_uint8_image(image)).save(folder / IMAGES / f"{name}-{index}.png")
