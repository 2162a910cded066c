"""Speed and size of the efficient UNet and decoder beside the model's own. SnapFusion Tables 1, 4, 5."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from jobs.evaluation.memory import measure_footprint
from jobs.evaluation.settings import EfficiencySettings, TimingSettings
from jobs.evaluation.timing import ORIGIN, TABLE_3, benchmark_of, runner_of, setting_of, unet_inputs
from snapfusion.evolution.stopwatch import time_in_turns
from snapfusion.export.modules import DecoderProgram
from snapfusion.models.architecture import Architecture, efficient_architecture
from snapfusion.models.cost import costs_of
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.unet import build_unet
from snapfusion.sampling import guide, sample, time_grid
from snapfusion.schedule import Estimate, PredictionType, Schedule

FULL, HALF = "original", "half-width"
"""The decoders."""


LOOP_STEPS = {ORIGIN: 50, TABLE_3: 8}
"""Of each UNet's loop, in Table 5."""


_GUIDANCE = 7.5


PAPER_RATIOS = {
    "step": 1.95,
    "loop": 12.2,
    "memory": 6634 / 3549,
    "parameters": 860 / 848,
    "decoder": 3.2,
    "decoder_parameters": 3.8,
}
"""How many times less, by Table 5 (an A100, TensorRT, FP32), Table 1 and Sec. 3.2 (an iPhone 14 Pro)."""


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
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
    settings: EfficiencySettings, *, model: MeasuredModel, say: Callable[[str], None] = lambda line: None
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
    architectures = {ORIGIN: origin, TABLE_3: efficient_architecture(origin)}
    footprints = {}
    for name, architecture in architectures.items():
        footprints[name] = measure_footprint(architecture, settings=settings, tokens=tokens)
        say(f"{name} alone: {footprints[name].unet_mb:,.0f} MB")
    torch.set_num_threads(settings.threads)
    unets = {
        name: _TimedUNet(shape, settings=settings, tokens=tokens) for name, shape in architectures.items()
    }
    decoders = {FULL: DecoderProgram(model.vae), HALF: DecoderProgram(HalfDecoder.from_vae(model.vae))}
    latent = torch.randn(1, origin.in_channels, origin.sample_size, origin.sample_size)
    parameters = {name: _parameters(decoder) for name, decoder in decoders.items()}
    times = time_in_turns(
        {name: unet.step for name, unet in unets.items()}
        | {name: benchmark_of(settings, decoder.eval(), (latent,)) for name, decoder in decoders.items()},
        turns=settings.turns,
        on_turn=lambda turn: say(f"{turn} of {settings.turns} turns"),
    )
    told: dict[str, Any] = {"setting": setting.to_values(), "tokens": tokens, "unets": {}, "decoders": {}}
    for name, unet in unets.items():
        loop_ms = LOOP_STEPS[name] * times[name].median_ms
        if settings.loop:
            loop_ms = unet.loop_ms(
                LOOP_STEPS[name], schedule=model.schedule, prediction_type=model.prediction_type
            )
            say(f"{LOOP_STEPS[name]} steps of {name}: {loop_ms / 1000:.4g} s")
        costs = costs_of(architectures[name], tokens=tokens).total
        told["unets"][name] = {
            "step": times[name].to_values(),
            "loop": {"steps": LOOP_STEPS[name], "ms": loop_ms, "executed": settings.loop},
            "memory": {**footprints[name].to_values(), "unet_mb": footprints[name].unet_mb},
            "parameters": costs.parameters,
            "macs": costs.macs,
        }
    for name in decoders:
        told["decoders"][name] = {"time": times[name].to_values(), "parameters": parameters[name]}
    return {**told, "ratios": _ratios(told)}


def _ratios(told: Mapping[str, Any]) -> dict[str, float]:
    """How many times less the efficient ones take."""
    origin, efficient = (told["unets"][name] for name in (ORIGIN, TABLE_3))
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


def _dtype(settings: TimingSettings) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, settings.precision)
    return dtype


class _TimedUNet:
    """A UNet that is ready to step."""

    def __init__(self, architecture: Architecture, *, settings: EfficiencySettings, tokens: int) -> None:
        self._device = torch.device(settings.device)
        inputs = unet_inputs(settings, architecture, tokens=tokens)
        self._call = runner_of(settings, build_unet(architecture).eval(), inputs)
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


def _parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def summary(told: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a file as a table, the paper's beside them."""
    origin, efficient = (told["unets"][name] for name in (ORIGIN, TABLE_3))
    full, half = (told["decoders"][name] for name in (FULL, HALF))
    loops = f"{LOOP_STEPS[ORIGIN]} and {LOOP_STEPS[TABLE_3]} steps, s"
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
        paper = f"{PAPER_RATIOS[name]:.3g}" if name in PAPER_RATIOS else ""
        yield f"{words:32}{before:12,.5g}{after:12,.5g}{told['ratios'][name]:12.3g}{paper:>12}"
    yield "The paper's are SD-v1.5's; its 848M parameters are not those of its Table 3 (ARCHITECTURE.md)."
