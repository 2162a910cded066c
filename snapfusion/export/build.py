"""Builds a mobile bundle in a folder; raises if any part of it does not agree with torch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from snapfusion.export.bundle import MODULES, SAFETY_CHECKER, SAMPLER, TOKENIZER, VECTORS, read_sampler
from snapfusion.export.executorch import ExecuTorchProgram
from snapfusion.export.layout import FORMAT_VERSION, RENOISING_VERSION
from snapfusion.export.modules import FixedModule, decoder_module, text_encoder_module, unet_module
from snapfusion.export.parity import ParityError, find_peak
from snapfusion.export.processes import Progress, Task, num_processes, run_tasks, worker_processes
from snapfusion.export.reference import Reference, generate_reference, samples_of
from snapfusion.export.sampler_coefficients import LinearSolver, SamplerCoefficients
from snapfusion.export.settings import AttentionLayout, MobileSettings
from snapfusion.export.units import UnitBuilder, UnitInputs, write_images
from snapfusion.export.variants import BundleVariant, groups_of, layout_of, variants_of
from snapfusion.export.vectors import write_vectors
from snapfusion.export.web_page import write_page
from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import count_parameters
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.defaults import distilled_solver, needs_one_pass, sampling_grid
from snapfusion.models.tokenizer import tokenize
from snapfusion.solver_names import CONSISTENCY

_TOKENIZER_EDGE_CASES = (
    "",
    "it's 3.14 o'clock -- “quoted”, naïve café",
    "  Two   spaces\tand a\nnewline  ",
    "一只猫 😀 ﬁ Ａ",
    "word " * 200,
)
"""Texts on which similar tokenizers differ."""

_LONGEST_FIRST = ("unet", "decoder", "text_encoder")
"""Modules by the time that they take: the last to begin are short, or other processes would wait for them."""

_BYTES_OF_LIBRARIES = 3 * 2**29
_COPIES_OF_WEIGHTS = 5
"""Most memory of a process that compiles, in float32 weights; measured with a full-size UNet."""


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
        progress: receives what is done and being done.
    """

    folder: Path
    bundle: Bundle
    decoder: HalfDecoder | None
    settings: MobileSettings
    num_steps: int
    scratch: Path
    progress: Progress

    def build(self) -> dict[str, Any]:
        """Compile every variant, and compare each part with torch.

        Returns:
            Entries of the manifest, as plain JSON values.

        Raises:
            ParityError: if a part does not agree with torch.
            LostProcessError: if a process that compiles is ended.
            ValueError: if the model cannot be compiled, or the safety checker does not take its images.
        """
        settings, variants = self.settings, variants_of(self.settings)
        names = [variant.name for variant in variants]
        if unknown := [name for name in settings.override if name not in names]:
            raise ValueError(f"mobile.override names {unknown[0]}; the variants are {', '.join(names)}")
        modules = {
            layout: self._modules(layout) for layout in {layout_of(each, settings) for each in variants}
        }
        tasks = self._tasks(variants)
        slots = max(1, min(num_processes(bytes_each=_bytes_of_process(modules.values())), len(tasks)))
        with worker_processes(slots) as executor:
            self._write_shared_files()
            safety_checker = self._add_safety_checker()
            UnitInputs(modules=modules, references=self.references).write(self._inputs)
            results = run_tasks(tasks, executor, slots=slots, progress=self.progress)
        return {
            "format": RENOISING_VERSION if self._sampler.solver == CONSISTENCY else FORMAT_VERSION,
            "latent_shape": list(self.bundle.latent_shape),
            "image_size": self.bundle.image_size,
            "conditions": self._sampling.conditions,
            # Its w is a constant of the programs, and an application takes w = 1.
            **({"folded_guidance": settings.guidance} if needs_one_pass(self.bundle) else {}),
            "parameters": self._num_parameters(),
            "captions": list(settings.captions),
            "variants": {variant.name: self._entry(variant, results) for variant in variants},
            "safety_checker": safety_checker,
            "distillation": self.bundle.distillation,
        }

    @property
    def _inputs(self) -> Path:
        return self.scratch / "inputs.pt"

    @cached_property
    def _sampling(self) -> MobileSettings:
        """The settings, with guidance and conditions of the programs: both are 1 if one pass is enough."""
        if not needs_one_pass(self.bundle):
            return self.settings
        return self.settings.model_copy(update={"guidance": 1.0, "conditions": 1})

    @cached_property
    def _sampler(self) -> SamplerCoefficients:
        """The steps of the sampler that the model was distilled for, or of DDIM."""
        bundle = self.bundle
        solver: LinearSolver = CONSISTENCY if distilled_solver(bundle) == CONSISTENCY else "ddim"
        return SamplerCoefficients.of(
            bundle.schedule,
            grid=sampling_grid(bundle, steps=self.num_steps, solver=solver),
            prediction_type=bundle.prediction_type,
            guidance=self._sampling.guidance,
            solver=solver,
        )

    @cached_property
    def references(self) -> list[Reference]:
        """torch's result for each caption."""
        return [self._reference(number) for number in range(len(self.settings.captions))]

    def _reference(self, number: int) -> Reference:
        settings, total = self.settings, len(self.settings.captions)
        title = f"caption {number + 1} of {total} by torch"
        self.progress.log(f"{title}: {self.num_steps} steps")
        return generate_reference(
            self.bundle,
            decode=self.decoder or self.bundle.decode,
            caption=settings.captions[number],
            num_steps=self.num_steps,
            w=settings.guidance,
            seed=settings.seed,
            on_step=lambda done: self.progress.status(f"{title}: step {done} done"),
        )

    def _tasks(self, variants: Sequence[BundleVariant]) -> list[Task]:
        """Compilation of each module for each variant; the images of a variant when its modules are done."""
        unit = UnitBuilder(
            folder=self.folder, scratch=self.scratch, inputs=self._inputs, settings=self._sampling
        )
        groups = groups_of(variants)
        compilations = [
            Task(name=_compilation(name, group), run=partial(unit.compile, name, group))
            for name in _LONGEST_FIRST
            for group in groups
        ]
        images = [
            Task(
                name=_images(variant),
                run=partial(unit.generate, variant),
                after=tuple(_compilation(name, group) for name in MODULES),
            )
            for group in groups
            for variant in group
        ]
        return compilations + images

    def _entry(self, variant: BundleVariant, results: Mapping[str, Any]) -> dict[str, Any]:
        """The variant's entry of the manifest."""
        (group,) = (group for group in groups_of(variants_of(self.settings)) if variant in group)
        return {
            "runtime": variant.runtime,
            "weights": variant.weights,
            "attention": layout_of(variant, self.settings),
            "measured": variant.measured,
            "modules": {name: results[_compilation(name, group)][variant.name] for name in MODULES},
            "images": results[_images(variant)],
        }

    def _write_shared_files(self) -> None:
        """Write what all variants share: sampler, tokenizer, test vectors, torch's images, and the page."""
        folder, bundle = self.folder, self.bundle
        (folder / SAMPLER).write_text(json.dumps(self._sampler.to_values(), indent=2) + "\n")
        bundle.tokenizer.save_pretrained(folder / TOKENIZER)
        self._check_tokenizer()
        # Read back at once: an error ends the build before anything is compiled.
        read_sampler(folder)
        self._check_references()
        write_vectors(folder / VECTORS, self.references, guidance=self._sampling.guidance)
        write_images(folder, "torch", [reference.image for reference in self.references])
        if self.settings.onnx:
            write_page(folder)

    def _check_references(self) -> None:
        """Refuse a model whose own outputs no program can be compared with."""
        for name in MODULES:
            samples = samples_of(self.references, module=name, conditions=self._sampling.conditions)
            find_peak([output for _, output in samples], artifact=name)

    def _check_tokenizer(self) -> None:
        """Compare the tokenizer on disk with the model's, also on texts on which similar ones differ."""
        written = CLIPTokenizer.from_pretrained(self.folder / TOKENIZER)
        added = self.bundle.tokenizer.added_tokens_encoder  # of textual inversions, too
        for text in (*self.settings.captions, *_TOKENIZER_EDGE_CASES, *added):
            if tokenize(written, [text]).tolist() != self.bundle.tokenize([text]).tolist():
                raise ParityError(f"{TOKENIZER} gives other ids than the model's own for {text[:60]!r}")

    def _num_parameters(self) -> dict[str, int]:
        """Of each module; of the model's own VAE only the decoder counts."""
        decoder = self.decoder or self.bundle.vae.decoder
        networks = {"text_encoder": self.bundle.text_encoder, "unet": self.bundle.unet, "decoder": decoder}
        return {name: count_parameters(network) for name, network in networks.items()}

    def _modules(self, layout: AttentionLayout) -> dict[str, FixedModule]:
        """The modules; those of all layouts share their weights."""
        bundle, length = self.bundle, self.bundle.tokenizer.model_max_length
        shape = (length, bundle.text_encoder.config.hidden_size)
        return {
            "text_encoder": text_encoder_module(bundle.text_encoder, length=length),
            "unet": unet_module(
                bundle.unet,
                condition_shape=shape,
                conditions=self._sampling.conditions,
                layout=layout,
                w=self.settings.guidance,
            ),
            "decoder": decoder_module(self.decoder or bundle.vae, latent_shape=bundle.latent_shape),
        }

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


def _compilation(name: str, group: Sequence[BundleVariant]) -> str:
    return f"{name} for {' and '.join(variant.name for variant in group)}"


def _images(variant: BundleVariant) -> str:
    return f"images by {variant.name}"


def _bytes_of_process(modules: Iterable[Mapping[str, FixedModule]]) -> int:
    """The memory that compiling the largest module takes."""
    sizes = (
        sum(tensor.numel() * tensor.element_size() for tensor in module.network.parameters())
        for each in modules
        for module in each.values()
    )
    return _BYTES_OF_LIBRARIES + _COPIES_OF_WEIGHTS * max(sizes, default=0)
