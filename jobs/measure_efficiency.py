"""Hold Table 3's UNet and the half-width decoder against the model's own. SnapFusion Table 1 and 5.

OUT/efficiency/RUNTIME-PRECISION-DEVICE.json   a step, the loop, memory, parameters; the decoders

Only shapes count here, so the UNets have random weights. What is compared takes turns; the loops of steps are
executed, once each; memory is that of a process in which a UNet is alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor

from jobs.exits import leave
from jobs.footprint import footprint_of
from jobs.timing import EFFICIENT, ORIGIN, TimingSettings, setting_of
from jobs.versions import versions
from pipelines.storage import exists, replace_object
from snapfusion.evolution.stopwatch import take_turns
from snapfusion.export.modules import DecoderProgram
from snapfusion.models.architecture import Architecture, table_3
from snapfusion.models.cost import costs_of
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build
from snapfusion.sampling import guide, sample, time_grid
from snapfusion.schedule import Estimate, PredictionType, Schedule

if TYPE_CHECKING:
    from jobs.cli import Job

FULL, HALF = "original", "half-width"
"""The decoders."""
STEPS = {ORIGIN: 50, EFFICIENT: 8}
"""Of each UNet's loop, in Table 5."""
_GUIDANCE = 7.5

PAPER = {
    "step": 1.95,
    "loop": 12.2,
    "memory": 6634 / 3549,
    "parameters": 860 / 848,
    "decoder": 3.2,
    "decoder_parameters": 3.8,
}
"""How many times less, by Table 5 (an A100, TensorRT, FP32), Table 1 and Sec. 3.2 (an iPhone 14 Pro)."""


class EfficiencySettings(TimingSettings):
    """How the networks are compared.

    Attributes:
        batch: latents at once; guidance asks for each twice, so 2 is one picture.
        loop: whether 50 steps of one and 8 of the other are executed; if not, steps times the median is told.
    """

    batch: int = Field(2, ge=2, multiple_of=2)
    loop: bool = True


@dataclass(frozen=True, kw_only=True)
class Model:
    """What of a Stable Diffusion is measured, and how its loop goes.

    Attributes:
        architecture: of its UNet.
        vae: whose decoder it is.
        schedule: of its loop.
        prediction_type: of its UNet.
        tokens: of an encoded caption.
    """

    architecture: Architecture
    vae: AutoencoderKL
    schedule: Schedule
    prediction_type: PredictionType
    tokens: int


def measure_efficiency(
    settings: EfficiencySettings, *, model: Model, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """What the networks take, as JSON values.

    Args:
        settings: how.
        model: its VAE is moved and cast in place.
        say: is told what is done.

    Raises:
        LatencyError: if the runtime or the device cannot do it.
        ArchitectureError: if Table 3 does not apply to the UNet.
        FootprintError: if a UNet alone does not fit.
    """
    setting, origin, tokens = setting_of(settings), model.architecture, model.tokens
    architectures = {ORIGIN: origin, EFFICIENT: table_3(origin)}
    footprints = {}
    for name, architecture in architectures.items():
        footprints[name] = footprint_of(architecture, settings=settings, tokens=tokens)
        say(f"{name} alone: {footprints[name].unet_mb:,.0f} MB")
    torch.set_num_threads(settings.threads)
    unets = {name: _Unet(shape, settings=settings, tokens=tokens) for name, shape in architectures.items()}
    decoders = {FULL: DecoderProgram(model.vae), HALF: DecoderProgram(HalfDecoder.from_vae(model.vae))}
    latent = torch.randn(1, origin.in_channels, origin.sample_size, origin.sample_size)
    parameters = {name: _parameters(decoder) for name, decoder in decoders.items()}
    times = take_turns(
        {name: unet.step for name, unet in unets.items()}
        | {name: settings.ready(decoder.eval(), (latent,)) for name, decoder in decoders.items()},
        turns=settings.turns,
        on_turn=lambda turn: say(f"{turn} of {settings.turns} turns"),
    )
    told: dict[str, Any] = {"setting": setting.to_values(), "tokens": tokens, "unets": {}, "decoders": {}}
    for name, unet in unets.items():
        loop_ms = STEPS[name] * times[name].median_ms
        if settings.loop:
            loop_ms = unet.loop_ms(
                STEPS[name], schedule=model.schedule, prediction_type=model.prediction_type
            )
            say(f"{STEPS[name]} steps of {name}: {loop_ms / 1000:.4g} s")
        costs = costs_of(architectures[name], tokens=tokens).whole
        told["unets"][name] = {
            "step": times[name].to_values(),
            "loop": {"steps": STEPS[name], "ms": loop_ms, "executed": settings.loop},
            "memory": {**footprints[name].to_values(), "unet_mb": footprints[name].unet_mb},
            "parameters": costs.parameters,
            "macs": costs.macs,
        }
    for name in decoders:
        told["decoders"][name] = {"time": times[name].to_values(), "parameters": parameters[name]}
    return {**told, "ratios": _ratios(told)}


def _ratios(told: Mapping[str, Any]) -> dict[str, float]:
    """How many times less the efficient ones take."""
    origin, efficient = (told["unets"][name] for name in (ORIGIN, EFFICIENT))
    full, half = (told["decoders"][name] for name in (FULL, HALF))
    return {
        "step": origin["step"]["median_ms"] / efficient["step"]["median_ms"],
        "loop": origin["loop"]["ms"] / efficient["loop"]["ms"],
        "memory": origin["memory"]["unet_mb"] / efficient["memory"]["unet_mb"],
        "parameters": origin["parameters"] / efficient["parameters"],
        "macs": origin["macs"] / efficient["macs"],
        "decoder": full["time"]["median_ms"] / half["time"]["median_ms"],
        "decoder_parameters": full["parameters"] / half["parameters"],
    }


class _Unet:
    """A UNet that is ready to step."""

    def __init__(self, architecture: Architecture, *, settings: EfficiencySettings, tokens: int) -> None:
        self._device = torch.device(settings.device)
        inputs = settings.inputs_of(architecture, tokens=tokens)
        self._call = settings.opened(build(architecture).eval(), inputs)
        # In the network's own precision and place, as a sampler has what does not change.
        self._inputs = [tensor.to(device=self._device, dtype=_dtype(settings)) for tensor in inputs]

    def step(self) -> None:
        """One pass; returns when it is done."""
        self._call(*self._inputs)
        self._wait()

    @torch.inference_mode()
    def loop_ms(self, steps: int, *, schedule: Schedule, prediction_type: PredictionType) -> float:
        """Milliseconds of as many guided DDIM steps, after one that is not counted."""
        z_t, _, c = self._inputs

        def denoiser(z_t: Tensor, t: Tensor) -> Estimate:
            output = self._call(z_t.repeat(2, 1, 1, 1), t.repeat(2).to(c.dtype), c).float()
            uncond, cond = output.chunk(2)
            output = guide(cond=cond, uncond=uncond, w=_GUIDANCE)
            return schedule.estimate(output, z_t=z_t, t=t, prediction_type=prediction_type)

        noise, grid = z_t[: len(z_t) // 2].float(), time_grid(steps, schedule_steps=schedule.num_steps)
        # A compiled network may be compiled once more for a sampler's tensors; that is not of the loop.
        sample(denoiser, noise, grid=grid[:2], schedule=schedule)
        self._wait()
        began = time.perf_counter()
        sample(denoiser, noise, grid=grid, schedule=schedule)
        self._wait()
        return 1000.0 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _dtype(settings: TimingSettings) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, settings.precision)
    return dtype


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.measure_efficiency`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("measure_efficiency", measure, preview=preview, about=__doc__, argv=argv)


def measure(job: Job) -> None:
    """Measure, and write the file; one that is there is left."""
    settings, place = job.recipe.efficiency, file_place(job)
    if exists(place):
        print(f"  {place} is there already")
        return
    bundle = load(job.recipe.model)
    model = Model(
        architecture=architecture_of(bundle.unet),
        vae=bundle.vae,
        schedule=bundle.schedule,
        prediction_type=bundle.prediction_type,
        tokens=settings.tokens_of(bundle.tokenizer),
    )
    del bundle  # its UNet would stand beside those that are measured
    told = {
        "recipe": job.recipe.name,
        "model": job.recipe.model,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "settings": settings.to_values(),
        **measure_efficiency(
            settings,
            model=model,
            say=lambda line: print(f"  {line}", flush=True),
        ),
    }
    replace_object(place, json.dumps(told, indent=1).encode())
    for line in summary(told):
        print(f"  {line}")
    print(f"  {place}")


def summary(told: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a file as a table, the paper's beside them."""
    origin, efficient = (told["unets"][name] for name in (ORIGIN, EFFICIENT))
    full, half = (told["decoders"][name] for name in (FULL, HALF))
    loops = f"{STEPS[ORIGIN]} and {STEPS[EFFICIENT]} steps, s"
    rows = {
        "step": ("a step, ms", origin["step"]["median_ms"], efficient["step"]["median_ms"]),
        "loop": (loops, origin["loop"]["ms"] / 1000, efficient["loop"]["ms"] / 1000),
        "memory": ("highest memory, MB", origin["memory"]["unet_mb"], efficient["memory"]["unet_mb"]),
        "parameters": ("parameters, millions", origin["parameters"] / 1e6, efficient["parameters"] / 1e6),
        "macs": ("multiply-accumulates, billions", origin["macs"] / 1e9, efficient["macs"] / 1e9),
        "decoder": ("decoder, ms", full["time"]["median_ms"], half["time"]["median_ms"]),
        "decoder_parameters": (
            "its parameters, millions",
            full["parameters"] / 1e6,
            half["parameters"] / 1e6,
        ),
    }
    yield f"{'':32}{'original':>12}{'efficient':>12}{'times less':>12}{'the paper':>12}"
    for name, (words, before, after) in rows.items():
        paper = f"{PAPER[name]:.3g}" if name in PAPER else ""
        yield f"{words:32}{before:12,.5g}{after:12,.5g}{told['ratios'][name]:12.3g}{paper:>12}"
    yield "The paper's are SD-v1.5's; its 848M parameters are not those of its Table 3 (ARCHITECTURE.md)."


def file_place(job: Job) -> str:
    """The run's file."""
    return job.place(f"efficiency/{job.recipe.efficiency.name}.json")


def preview(job: Job) -> list[str]:
    """What would be measured."""
    settings, place = job.recipe.efficiency, file_place(job)
    there = "which is there already" if exists(place) else "which is not there yet"
    loops = (
        f" and execute {STEPS[ORIGIN]} steps of one, {STEPS[EFFICIENT]} of the other" if settings.loop else ""
    )
    return [
        f"would take {settings.turns} turns of a step of {job.recipe.model}'s UNet and of Table 3's{loops}, "
        f"by {settings.runtime} in {settings.precision} on {settings.device}, into {place} ({there})"
    ]


if __name__ == "__main__":
    leave(main())
