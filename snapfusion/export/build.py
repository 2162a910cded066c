"""Builds a mobile bundle in a folder; raises if any part of it does not agree with torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from snapfusion.export.bundle import (
    EXECUTORCH,
    MODULES,
    SAFETY_CHECKER,
    SAMPLER,
    TOKENIZER,
    VECTORS,
    read_sampler,
)
from snapfusion.export.executorch import ExecuTorchProgram
from snapfusion.export.layout import IMAGES
from snapfusion.export.loop import CompiledModel, RunModule, generate, to_uint8_image
from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.export.reference import Reference, generate_reference, samples_of
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.settings import AttentionLayout, MobileSettings
from snapfusion.export.variants import BundleVariant, compile_module, total_bytes, variants_of
from snapfusion.export.vectors import write_vectors
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import count_parameters
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.tokenizer import tokenize
from snapfusion.sampling import time_grid

_TOKENIZER_EDGE_CASES = (
    "",
    "it's 3.14 o'clock -- “quoted”, naïve café",
    "  Two   spaces\tand a\nnewline  ",
    "一只猫 😀 ﬁ Ａ",
    "word " * 200,
)
"""Texts on which similar tokenizers differ."""


@dataclass(frozen=True, kw_only=True)
class BundleBuilder:
    """Fills the empty folder of a bundle with everything but manifest and card.

    Attributes:
        folder: of the bundle.
        bundle: the model, float32 on the CPU.
        decoder: its half-width decoder; None for the model's own.
        settings: variants, limits and reference captions.
        num_steps: of the sampler.
        scratch: an empty folder on the same disk, for packages before compression.
        log: called with a line about each stage of the build.
    """

    folder: Path
    bundle: Bundle
    decoder: HalfDecoder | None
    settings: MobileSettings
    num_steps: int
    scratch: Path
    log: Callable[[str], None]

    def build(self) -> dict[str, Any]:
        """Compile every variant, and compare each part with torch.

        Returns:
            Entries of the manifest, as plain JSON values.

        Raises:
            ParityError: if a part does not agree with torch.
            ValueError: if the model cannot be compiled, or the safety checker does not take its images.
        """
        settings, variants = self.settings, variants_of(self.settings)
        names = [variant.name for variant in variants]
        if unknown := [name for name in settings.override if name not in names]:
            raise ValueError(f"mobile.override names {unknown[0]}; the variants are {', '.join(names)}")
        self.log(f"generating {len(settings.captions)} captions by torch in {self.num_steps} steps")
        self._write_shared_files()
        return {
            "latent_shape": list(self.bundle.latent_shape),
            "image_size": self.bundle.image_size,
            "conditions": settings.conditions,
            "parameters": self._num_parameters(),
            "captions": list(settings.captions),
            "variants": {variant.name: self._build_variant(variant) for variant in variants},
            "safety_checker": self._add_safety_checker(),
        }

    @cached_property
    def references(self) -> list[Reference]:
        """What torch computes for each caption."""
        decode, settings = self.decoder or self.bundle.decode, self.settings
        options: dict[str, Any] = {"num_steps": self.num_steps, "w": settings.guidance, "seed": settings.seed}
        return [
            generate_reference(self.bundle, decode=decode, caption=caption, **options)
            for caption in settings.captions
        ]

    def _write_shared_files(self) -> None:
        """Write what all variants share: sampler, tokenizer, test vectors and torch's images."""
        folder, bundle, guidance = self.folder, self.bundle, self.settings.guidance
        sampler = SamplerCoefficients.of(
            bundle.schedule,
            grid=time_grid(self.num_steps, schedule_steps=bundle.schedule.num_steps),
            prediction_type=bundle.prediction_type,
            guidance=guidance,
        )
        (folder / SAMPLER).write_text(json.dumps(sampler.to_values(), indent=2) + "\n")
        bundle.tokenizer.save_pretrained(folder / TOKENIZER)
        self._check_tokenizer()
        write_vectors(folder / VECTORS, self.references, guidance=guidance)
        self._write_images("torch", [reference.image for reference in self.references])

    def _check_tokenizer(self) -> None:
        """Compare the tokenizer on disk with the model's, also on texts on which similar ones differ."""
        written = CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)
        for text in (*self.settings.captions, *_TOKENIZER_EDGE_CASES):
            if tokenize(written, [text]).tolist() != self.bundle.tokenize([text]).tolist():
                raise ParityError(f"{TOKENIZER} gives other ids than the model's own for {text[:60]!r}")

    def _num_parameters(self) -> dict[str, int]:
        """Of each module; of the model's own VAE only the decoder counts."""
        decoder = self.decoder or self.bundle.vae.decoder
        networks = {"text_encoder": self.bundle.text_encoder, "unet": self.bundle.unet, "decoder": decoder}
        return {name: count_parameters(network) for name, network in networks.items()}

    def _build_variant(self, variant: BundleVariant) -> dict[str, Any]:
        """Compile and compare the variant's modules, then the images that they generate together.

        Returns:
            The variant's entry of the manifest.

        Raises:
            ParityError: if one is below its limit and has no override.
        """
        (self.folder / variant.name).mkdir()
        layout: AttentionLayout = "diffusers" if variant.runtime == EXECUTORCH else self.settings.attention
        runs, records = {}, {}
        for name in MODULES:
            self.log(f"{variant.name}: compiling {name}")
            # Created one at a time: at full size a module takes gigabytes.
            runs[name], records[name] = self._compile(self._module(name, layout=layout), variant=variant)
        self.log(f"{variant.name}: generating {len(self.references)} captions")
        model = CompiledModel(**runs, conditions=self.settings.conditions)
        return {
            "runtime": variant.runtime,
            "weights": variant.weights,
            "attention": layout,
            "measured": variant.measured,
            "modules": records,
            "images": self._check_images(model, variant=variant),
        }

    def _module(self, name: str, *, layout: AttentionLayout) -> FixedModule:
        bundle, length = self.bundle, self.bundle.tokenizer.model_max_length
        if name == "text_encoder":
            return text_encoder_module(bundle.text_encoder, length=length)
        if name == "unet":
            shape = (length, bundle.text_encoder.config.hidden_size)
            conditions = self.settings.conditions
            return unet_module(bundle.unet, condition_shape=shape, conditions=conditions, layout=layout)
        return decoder_module(self.decoder or bundle.vae, latent_shape=bundle.latent_shape)

    def _compile(self, module: FixedModule, *, variant: BundleVariant) -> tuple[RunModule, dict[str, Any]]:
        settings = self.settings
        samples = samples_of(self.references, module=module.name, conditions=settings.conditions)
        compiled = compile_module(
            variant, module, self.folder, scratch=self.scratch, chunk_bytes=settings.chunk_bytes
        )
        parity = check_parity(
            artifact=f"{variant.name}/{module.name}",
            outputs=[compiled.run(inputs) for inputs, _ in samples],
            references=[output for _, output in samples],
            # Compressed weights are compared by their images; here only non-finite outputs are refused.
            limit_db=settings.parity_limit_db if variant.exact else 0.0,
            override=settings.override.get(variant.name),
        )
        return compiled.run, {
            "files": list(compiled.files),
            "bytes": sum(total_bytes(self.folder / file) for file in compiled.files),
            **compiled.record,
            "parity": asdict(parity),
            **compiled.record_after(),
        }

    def _check_images(self, model: CompiledModel, *, variant: BundleVariant) -> dict[str, Any]:
        settings, w = self.settings, self.settings.guidance
        # Read from disk, as an application does, so that an error in either file shows in the images.
        sampler = read_sampler(self.folder)
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)
        images = []
        for reference in self.references:
            ids = tokenize(tokenizer, ["", reference.caption]).numpy().astype(np.int32)
            images.append(generate(model, ids=ids, noise=reference.noise, sampler=sampler, w=w))
        parity = check_parity(
            artifact=f"the images of {variant.name}",
            outputs=images,
            references=[reference.image for reference in self.references],
            limit_db=settings.parity_limit_db if variant.exact else settings.quantized_limit_db,
            override=settings.override.get(variant.name),
        )
        self._write_images(variant.name, images)
        return asdict(parity)

    def _write_images(self, name: str, images: Sequence[np.ndarray]) -> None:
        folder = self.folder / IMAGES
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            Image.fromarray(to_uint8_image(image)).save(folder / f"{name}-{index}.png")

    def _add_safety_checker(self) -> str | None:
        """Copy the safety checker into the bundle and run it once; its file name, or None."""
        if (path := self.settings.safety_checker) is None:
            return None
        target, image = self.folder / SAFETY_CHECKER, self.references[0].image
        try:
            target.write_bytes(Path(path).read_bytes())
            score = ExecuTorchProgram(target)([image])
        except (OSError, ValueError) as error:
            raise ValueError(
                f"mobile.safety_checker {path}: {error}; a .pte that takes the image {list(image.shape)} is "
                "accepted"
            ) from None
        if score.size != 1:
            raise ValueError(f"mobile.safety_checker {path} gives {score.size} numbers; one is accepted")
        return SAFETY_CHECKER
