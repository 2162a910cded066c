"""A folder of resources in the layout of Apple's ml-stable-diffusion, compared with torch.

TextEncoder.mlpackage   the text encoder
Unet.mlpackage          the UNet; if it is large, UnetChunk1.mlpackage and UnetChunk2.mlpackage
VAEDecoder.mlpackage    the decoder
vocab.json, merges.txt  CLIP's tokenizer
README.md               how to compile and to load them (`snapfusion.export.apple_readme`)

Its Swift pipeline loads compiled packages, `NAME.mlmodelc`, which only Apple's compiler on a Mac makes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from snapfusion.export.apple_modules import SCALING_FACTOR, apple_modules
from snapfusion.export.apple_schedulers import DPM, PNDM, SCHEDULE, apple_latent
from snapfusion.export.coreml import compile_coreml, compress_package, split_package
from snapfusion.export.coreml_package import check_weights, describe_package, read_program
from snapfusion.export.loop import CompiledModel, RunModule, generate
from snapfusion.export.mil import MaxAbsObserver, evaluate
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.parity import Parity, ParityError, check_parity, psnr
from snapfusion.export.reference import Reference, Sample, generate_reference
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.settings import AppleSettings
from snapfusion.export.variants import total_bytes
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.defaults import default_guidance, distilled_solver, distilled_steps
from snapfusion.sampling import time_grid
from snapfusion.solver_names import CONSISTENCY

CHUNKS = ("UnetChunk1", "UnetChunk2")
"""Names of a UNet's two packages, which Apple's pipeline looks for first."""


class AppleLayoutError(ValueError):
    """A model that Apple's pipeline cannot sample."""


@dataclass(frozen=True, kw_only=True)
class AppleResources:
    """What was written and how it agrees with torch.

    Attributes:
        packages: bytes of each package, by its name.
        parity: of each module, and of the "image" by the student's own DDIM steps.
        schedulers: PSNR in dB, peak 1, of the image by each of the Swift pipeline's schedulers, in torch, to
            the image by DDIM; infinite if they are equal.
        steps: of these images.
        guidance: likewise.
    """

    packages: Mapping[str, int]
    parity: Mapping[str, Parity]
    schedulers: Mapping[str, float]
    steps: int
    guidance: float


def check_apple_layout(bundle: Bundle) -> None:
    """Check that Apple's pipeline can sample a model.

    Raises:
        AppleLayoutError: if it cannot.
    """
    if bundle.schedule != SCHEDULE:
        raise AppleLayoutError(
            f"{bundle.source} has another noise schedule than Stable Diffusion, whose betas are constants in "
            "Apple's schedulers"
        )
    if (solver := distilled_solver(bundle)) == CONSISTENCY:
        raise AppleLayoutError(
            f"{bundle.source} was distilled for the sampler {solver}, and Apple's pipelines add no noise at "
            "their steps"
        )


def write_apple_resources(
    folder: Path,
    *,
    bundle: Bundle,
    decoder: HalfDecoder | None,
    settings: AppleSettings,
    scratch: Path,
    log: Callable[[str], None],
) -> AppleResources:
    """Write packages and tokenizer into an empty folder.

    Args:
        folder: of the resources.
        bundle: the model, float32 on the CPU.
        decoder: its half-width decoder; None for its own.
        settings: weights, layout and the image for comparison.
        scratch: an empty folder for packages before compression.
        log: receives a line for each part.

    Raises:
        AppleLayoutError: if Apple's pipeline cannot sample the model.
        UNetError: if its UNet takes the guidance scale as an input.
        ParityError: if a package does not agree with torch, or states other ports.
    """
    check_apple_layout(bundle)
    modules = apple_modules(
        bundle, decoder=decoder, conditions=settings.conditions, layout=settings.attention
    )
    steps = settings.steps or distilled_steps(bundle)
    guidance = settings.guidance or default_guidance(bundle)
    log(f"image of {steps} steps by torch")
    reference = generate_reference(
        bundle,
        decode=decoder or bundle.decode,
        caption=settings.caption,
        num_steps=steps,
        w=guidance,
        seed=settings.seed,
    )
    packages: dict[str, int] = {}
    runs: dict[str, RunModule] = {}
    for name, module in modules.items():
        log(f"{name}: compiled for Core ML")
        paths = _compile(module, folder, settings=settings, scratch=scratch)
        packages |= {path.stem: total_bytes(path) for path in paths}
        runs[name] = _open(module, paths, exact=settings.weights == "float16")
    log("packages compared with torch")
    parity = _compare(runs, reference, bundle, settings=settings, w=guidance)
    bundle.tokenizer.backend_tokenizer.model.save(str(folder))
    return AppleResources(
        packages=packages,
        parity=parity,
        schedulers=_schedulers(bundle, decoder, reference, w=guidance),
        steps=steps,
        guidance=guidance,
    )


def _compile(
    module: FixedModule, folder: Path, *, settings: AppleSettings, scratch: Path
) -> tuple[Path, ...]:
    """Write the module's package, or the two of a large UNet."""
    whole = scratch / f"{module.name}.mlpackage"
    compile_coreml(module, whole)
    parts: tuple[Path, ...] = (whole,)
    if module.name == "Unet" and total_bytes(whole) > settings.chunk_bytes:
        parts = split_package(whole, scratch, names=CHUNKS)
    for part in parts:
        compress_package(part, folder / part.name, weights=settings.weights)
    return tuple(folder / part.name for part in parts)


def _open(module: FixedModule, paths: Sequence[Path], *, exact: bool) -> RunModule:
    """What the packages compute, after a check of their ports and, if they are float16, their weights."""
    check_ports(module, paths)
    programs = [read_program(path) for path in paths]
    if exact:
        check_weights(programs, module.network.state_dict())
    # Observed, because a result that is not finite is refused.
    return partial(evaluate, programs, observe=MaxAbsObserver())


def check_ports(module: FixedModule, paths: Sequence[Path]) -> None:
    """Compare names, shapes and dtypes of packages' ports with those that Apple's pipeline uses.

    Raises:
        ParityError: naming the port that differs.
    """
    for side in ("inputs", "outputs"):
        descriptions = [describe_package(path) for path in paths]
        stated = {port.name: port for package in descriptions for port in getattr(package, side)}
        for port in getattr(module, side):
            given, needed = stated.get(port.name), (port.shape, _dtype(port))
            if given is None or (given.shape, given.dtype) != needed:
                raise ParityError(f"{module.name} states {port.name} as {given}; Apple's has {needed}")


def _dtype(port: Port) -> str:
    return "INT32" if port.kind == "int32" else port.coreml.upper()


def _compare(
    runs: Mapping[str, RunModule], reference: Reference, bundle: Bundle, *, settings: AppleSettings, w: float
) -> dict[str, Parity]:
    """Compare each package with torch, and the image by all of them in DDIM steps."""
    exact = settings.weights == "float16"
    samples = _samples(reference, bundle, conditions=settings.conditions)
    parity = {
        name: check_parity(
            artifact=f"{name}.mlpackage",
            outputs=[_as_compared(name, run(inputs)) for inputs, _ in samples[name]],
            references=[output for _, output in samples[name]],
            # Compressed weights are compared by the image.
            limit_db=settings.parity_limit_db if exact else 0.0,
        )
        for name, run in runs.items()
    }
    parity["image"] = check_parity(
        artifact="the image by the packages",
        outputs=[_generate(runs, reference, bundle, conditions=settings.conditions, w=w)],
        references=[reference.image],
        limit_db=settings.parity_limit_db if exact else settings.quantized_limit_db,
    )
    return parity


def _samples(reference: Reference, bundle: Bundle, *, conditions: int) -> dict[str, list[Sample]]:
    """Inputs of each package as Apple's pipeline gives them, and the expected outputs."""
    pairs = zip(reference.ids, reference.c, strict=True)
    text: list[Sample] = [([ids[None].astype(np.float32)], c[None]) for ids, c in pairs]
    unet: list[Sample] = []
    for step in reference.steps:
        t, z_t = torch.tensor([step.t]), torch.from_numpy(step.z_t)
        output = torch.from_numpy(step.outputs)
        estimate = bundle.schedule.estimate(output, z_t=z_t, t=t, prediction_type=bundle.prediction_type)
        for first in range(0, 2, conditions):
            rows = slice(first, first + conditions)
            inputs = _unet_inputs(step.z_t, np.array([step.t], np.float32), reference.c[rows])
            unet.append((inputs, estimate.eps[rows].numpy()))
    latent = reference.latent / np.float32(SCALING_FACTOR)
    return {"TextEncoder": text, "Unet": unet, "VAEDecoder": [([latent], reference.image)]}


def _unet_inputs(z_t: np.ndarray, t: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """[B,4,h,w], [B] and [B,D,1,L], as Apple's pipeline gives them, of z_t [1,4,h,w], t [1] and c [B,L,D]."""
    return [np.repeat(z_t, len(c), axis=0), np.repeat(t, len(c)), c.transpose(0, 2, 1)[:, :, None]]


def _as_compared(name: str, output: np.ndarray) -> np.ndarray:
    """An output as torch's reference has it: images in 0 .. 1, as Apple's pipelines show them."""
    return (output / 2 + 0.5).clip(0.0, 1.0) if name == "VAEDecoder" else output


def _generate(
    runs: Mapping[str, RunModule], reference: Reference, bundle: Bundle, *, conditions: int, w: float
) -> np.ndarray:
    """The image by the packages in DDIM steps, [1,3,H,W] in 0 .. 1."""
    model = CompiledModel(
        text_encoder=lambda inputs: runs["TextEncoder"]([inputs[0].astype(np.float32)]),
        unet=lambda inputs: runs["Unet"](_unet_inputs(*inputs)),
        decoder=lambda inputs: _as_compared(
            "VAEDecoder", runs["VAEDecoder"]([inputs[0] / np.float32(SCALING_FACTOR)])
        ),
        conditions=conditions,
    )
    grid = time_grid(len(reference.steps), schedule_steps=bundle.schedule.num_steps)
    sampler = SamplerCoefficients.of(bundle.schedule, grid=grid, prediction_type="epsilon", guidance=w)
    return generate(model, ids=reference.ids, noise=reference.noise, sampler=sampler, w=w)


@torch.inference_mode()
def _schedulers(
    bundle: Bundle, decoder: HalfDecoder | None, reference: Reference, *, w: float
) -> dict[str, float]:
    """PSNR of the image by each of the Swift pipeline's schedulers to the reference."""
    c_null, c = torch.from_numpy(reference.c).split(1)
    denoiser = bundle.denoiser(c, w=w, c_null=c_null)
    noise, steps = torch.from_numpy(reference.noise), len(reference.steps)
    found = {}
    # PNDM has no single step.
    for scheduler in (DPM, PNDM) if steps > 1 else (DPM,):
        latent = apple_latent(denoiser, noise, scheduler=scheduler, num_steps=steps)
        image = (decoder or bundle).decode(latent) * 0.5 + 0.5
        found[scheduler] = psnr(image.numpy(), reference.image, peak=1.0)
    return found
