"""A mobile bundle, made of a model in a folder of its own; the gate is passed or nothing comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from snapfusion.export.bundle import (
    IMAGES,
    MODULES,
    SAFETY_CHECKER,
    SAMPLER,
    TOKENIZER,
    VECTORS,
    read_sampler,
)
from snapfusion.export.executorch import ExecuTorchProgram
from snapfusion.export.loop import CompiledModel, generate, to_uint8_image
from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.export.reference import Reference, generate_reference, samples_of
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.settings import MobileSettings
from snapfusion.export.variants import BundleVariant, CompiledModule, total_bytes, variants_of
from snapfusion.export.vectors import write_vectors
from snapfusion.models.bundle import Bundle
from snapfusion.models.checksums import file_hash
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.tokenizer import tokenize
from snapfusion.sampling import time_grid

Log = Callable[[str], None]

_TOKENIZER_EDGE_CASES = (
    "",
    "it's 3.14 o'clock -- “quoted”, naïve café",
    "  Two   spaces\tand a\nnewline  ",
    "一只猫 😀 ﬁ Ａ",
    "word " * 200,
)
"""Texts on which tokenizers that are nearly the same differ."""


def build_bundle(
    folder: Path,
    *,
    bundle: Bundle,
    decoder: HalfDecoder | None,
    settings: MobileSettings,
    number_of_steps: int,
    scratch: Path,
    say: Log = lambda _: None,
) -> dict[str, Any]:
    """Fill the empty `folder` with everything but the manifest and the card, each part held to torch.

    Args:
        folder: of the bundle.
        bundle: the model, float32 on the CPU.
        decoder: its half-width decoder; None for the model's own.
        settings: what is asked for.
        number_of_steps: of the sampler.
        scratch: an empty folder on the same disk, for what is compressed further.
        say: is told what is being done.

    Returns:
        What the manifest says of it, as plain JSON values.

    Raises:
        ParityError: if a part does not agree with torch.
        ValueError: if the model cannot be compiled, or the safety checker is none.
    """
    variants = variants_of(settings, scratch=scratch)
    _check_override(settings, variants)
    say(f"drawing {len(settings.captions)} captions by torch in {number_of_steps} steps")
    references = [
        generate_reference(
            bundle,
            decode=bundle.decode if decoder is None else decoder,
            caption=caption,
            number_of_steps=number_of_steps,
            w=settings.guidance,
            seed=settings.seed,
        )
        for caption in settings.captions
    ]
    _write_sampler(folder, bundle=bundle, number_of_steps=number_of_steps, guidance=settings.guidance)
    bundle.tokenizer.save_pretrained(folder / TOKENIZER)
    check_tokenizer(folder, bundle=bundle, captions=settings.captions)
    write_vectors(folder / VECTORS, references, guidance=settings.guidance)
    _write_images(folder, name="torch", images=[reference.image for reference in references])
    gate = ParityGate(folder=folder, references=references, settings=settings, say=say)
    modules = _Modules(bundle=bundle, decoder=decoder, conditions=settings.conditions)
    return {
        "latent_shape": list(bundle.latent_shape),
        "image_size": bundle.image_size,
        "conditions": settings.conditions,
        "parameters": modules.parameters(),
        "captions": list(settings.captions),
        "variants": {variant.name: gate.hold(variant, modules=modules) for variant in variants},
        "safety_checker": _add_safety_checker(folder, settings=settings, references=references),
    }


def _check_override(settings: MobileSettings, variants: Sequence[BundleVariant]) -> None:
    names = [variant.name for variant in variants]
    if unknown := [name for name in settings.override if name not in names]:
        raise ValueError(f"mobile.override names {unknown[0]}; {', '.join(names)} are asked for")


def _write_sampler(folder: Path, *, bundle: Bundle, number_of_steps: int, guidance: float) -> None:
    steps = SamplerCoefficients.of(
        bundle.schedule,
        grid=time_grid(number_of_steps, schedule_steps=bundle.schedule.num_steps),
        prediction_type=bundle.prediction_type,
        guidance=guidance,
    )
    (folder / SAMPLER).write_text(json.dumps(steps.to_values(), indent=2) + "\n")


def check_tokenizer(folder: Path, *, bundle: Bundle, captions: Sequence[str]) -> None:
    """Hold the tokenizer on the disk to the model's.

    Raises:
        ParityError: naming the first text that it reads otherwise.
    """
    written = CLIPTokenizer.from_pretrained(folder / TOKENIZER)
    for text in (*captions, *_TOKENIZER_EDGE_CASES):
        if tokenize(written, [text]).tolist() != bundle.tokenize([text]).tolist():
            raise ParityError(f"{TOKENIZER} gives other ids than the model's own for {text[:60]!r}")


@dataclass(kw_only=True)
class _Modules:
    """The model's modules, made when they are asked for: at full size one holds gigabytes."""

    bundle: Bundle
    decoder: HalfDecoder | None
    conditions: Literal[1, 2]

    def make(self, name: str, *, variant: BundleVariant) -> FixedModule:
        """The module of that name, with attention in the variant's form."""
        text = self.bundle.text_encoder.config
        length = self.bundle.tokenizer.model_max_length
        if name == "text_encoder":
            return text_encoder_module(self.bundle.text_encoder, length=length)
        if name == "unet":
            return unet_module(
                self.bundle.unet,
                condition_shape=(length, text.hidden_size),
                conditions=self.conditions,
                form=variant.form,
            )
        return decoder_module(self.decoder or self.bundle.vae, latent_shape=self.bundle.latent_shape)

    def parameters(self) -> dict[str, int]:
        """How many each has; of the model's own VAE the decoding half counts."""
        decoder = self.decoder or self.bundle.vae.decoder
        networks = {"text_encoder": self.bundle.text_encoder, "unet": self.bundle.unet, "decoder": decoder}
        return {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in networks.items()
        }


@dataclass(kw_only=True)
class ParityGate:
    """Holds variants to what torch drew.

    Attributes:
        folder: of the bundle.
        references: what torch drew.
        settings: the limits.
        say: is told what is being done.
    """

    folder: Path
    references: Sequence[Reference]
    settings: MobileSettings
    say: Log = field(default=lambda _: None)

    def hold(self, variant: BundleVariant, *, modules: _Modules) -> dict[str, Any]:
        """Compile the variant's modules and compare each, then the images that they draw together.

        Raises:
            ParityError: if one is below its limit and no override says why it may be.
        """
        (self.folder / variant.name).mkdir()
        told, made = {}, {}
        for name in MODULES:
            self.say(f"{variant.name}: compiling {name}")
            made[name], told[name] = self._module(modules.make(name, variant=variant), variant=variant)
        self.say(f"{variant.name}: drawing {len(self.references)} captions")
        return {
            "runtime": variant.runtime,
            "weights": variant.weights,
            "attention": variant.form,
            "measured": variant.measured,
            "modules": told,
            "images": self._images(made, variant=variant),
        }

    def _module(
        self, module: FixedModule, *, variant: BundleVariant
    ) -> tuple[CompiledModule, dict[str, Any]]:
        samples = samples_of(self.references, module=module.name, conditions=self.settings.conditions)
        made = variant.compile(module, self.folder)
        told = {
            "files": list(made.files),
            "bytes": sum(total_bytes(self.folder / file) for file in made.files),
            **made.told,
        }
        parity = check_parity(
            artifact=f"{variant.name}/{module.name}",
            outputs=[made.run(inputs) for inputs, _ in samples],
            references=[output for _, output in samples],
            # Compressed weights are judged by the image; what is not finite is refused here too.
            limit_db=self.settings.parity_limit_db if variant.exact else 0.0,
            override=self.settings.override.get(variant.name),
        )
        return made, told | {"parity": parity.to_values(), **made.after()}

    def _images(self, made: Mapping[str, CompiledModule], *, variant: BundleVariant) -> dict[str, Any]:
        runs = {name: each.run for name, each in made.items()}
        programs = CompiledModel(**runs, conditions=self.settings.conditions)
        # From the disk, as an application finds them.
        steps = read_sampler(self.folder)
        tokenizer = CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)
        images = [
            generate(
                programs,
                ids=tokenize(tokenizer, ["", reference.caption]).numpy().astype(np.int32),
                noise=reference.noise,
                steps=steps,
                w=self.settings.guidance,
            )
            for reference in self.references
        ]
        limit = self.settings.parity_limit_db if variant.exact else self.settings.quantized_limit_db
        parity = check_parity(
            artifact=f"the images of {variant.name}",
            outputs=images,
            references=[reference.image for reference in self.references],
            limit_db=limit,
            override=self.settings.override.get(variant.name),
        )
        _write_images(self.folder, name=variant.name, images=images)
        return parity.to_values()


def _write_images(folder: Path, *, name: str, images: Sequence[np.ndarray]) -> None:
    (folder / IMAGES).mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(to_uint8_image(image)).save(folder / IMAGES / f"{name}-{number}.png")


def _add_safety_checker(
    folder: Path, *, settings: MobileSettings, references: Sequence[Reference]
) -> str | None:
    if settings.safety_checker is None:
        return None
    place = folder / SAFETY_CHECKER
    try:
        place.write_bytes(Path(settings.safety_checker).read_bytes())
        verdict = ExecuTorchProgram(place)([references[0].image])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"mobile.safety_checker {settings.safety_checker}: {error}; a .pte that takes the image "
            f"{list(references[0].image.shape)} is accepted"
        ) from None
    if verdict.size != 1:
        raise ValueError(
            f"mobile.safety_checker {settings.safety_checker} gives {verdict.size} numbers; one is accepted"
        )
    return SAFETY_CHECKER


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, for the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in paths
    }
