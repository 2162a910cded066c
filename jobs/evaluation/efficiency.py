"""Speed and size of the efficient UNet and decoder beside the model's own. SnapFusion Tables 1, 4, 5."""

import time
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from jobs.evaluation.memory import measure_footprint
from jobs.evaluation.settings import ORIGIN, TABLE_3, EfficiencySettings
from jobs.evaluation.timing import MeasuredModel, backend_of, setting_of, unet_inputs
from jobs.runtime.logs import logger
from jobs.runtime.progress import show_status
from snapfusion.evolution.stopwatch import time_in_turns
from snapfusion.export.modules import DecoderProgram
from snapfusion.models.architecture import Architecture, efficient_architecture
from snapfusion.models.cost import costs_of
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.unet import build_unet
from snapfusion.sampling import guide, sample, time_grid
from snapfusion.schedule import Estimate

FULL, HALF = "original", "half-width"
"""Names of the decoders."""

LOOP_STEPS = {ORIGIN: 50, TABLE_3: 8}
"""Sampling steps of each UNet in Table 5."""

_GUIDANCE = 7.5

PAPER_RATIOS = {
    "step": 1.95,
    "loop": 12.2,
    "memory": 6634 / 3549,
    "parameters": 860 / 848,
    "decoder": 3.2,
    "decoder_parameters": 3.8,
}
"""Ratios of Table 5 (an A100, TensorRT, FP32), Table 1 and Sec. 3.2 (an iPhone 14 Pro)."""

_ROWS: dict[str, tuple[str, str, tuple[str, ...], float]] = {
    "step": ("a step, ms", "unets", ("step", "median_ms"), 1.0),
    "loop": ("{} and {} steps, s".format(*LOOP_STEPS.values()), "unets", ("loop", "ms"), 1e3),
    "memory": ("highest memory, MB", "unets", ("memory", "unet_mb"), 1.0),
    "parameters": ("parameters, millions", "unets", ("parameters",), 1e6),
    "macs": ("multiply-accumulates, billions", "unets", ("macs",), 1e9),
    "decoder": ("decoder, ms", "decoders", ("time", "median_ms"), 1.0),
    "decoder_parameters": ("its parameters, millions", "decoders", ("parameters",), 1e6),
}
"""Rows of the comparison: label, section of the record, path in it, and unit."""


def measure_efficiency(settings: EfficiencySettings, *, model: MeasuredModel) -> dict[str, Any]:
    """Measure both UNets and both decoders; returns JSON values.

    Args:
        settings: of the measurement.
        model: its VAE is moved and cast in place.

    Raises:
        LatencyError: if the runtime cannot run in that precision or on that device.
        ArchitectureError: if Table 3 does not apply to the UNet.
        FootprintError: if a UNet does not fit into memory.
    """
    setting, origin, tokens = setting_of(settings), model.architecture, model.tokens
    architectures = {ORIGIN: origin, TABLE_3: efficient_architecture(origin)}
    footprints = {}
    for name, architecture in architectures.items():
        footprints[name] = measure_footprint(architecture, settings=settings, tokens=tokens)
        logger.info(f"  {name} alone: {footprints[name].unet_mb:,.0f} MB")
    torch.set_num_threads(settings.threads)
    unets = {
        name: _TimedUNet(shape, settings=settings, tokens=tokens) for name, shape in architectures.items()
    }
    decoders = {FULL: DecoderProgram(model.vae), HALF: DecoderProgram(HalfDecoder.from_vae(model.vae))}
    parameters = {name: sum(p.numel() for p in decoder.parameters()) for name, decoder in decoders.items()}
    latent = torch.randn(1, origin.in_channels, origin.sample_size, origin.sample_size)
    backend = backend_of(settings)
    times = time_in_turns(
        {name: unet.step for name, unet in unets.items()}
        | {name: backend.benchmark(decoder.eval(), (latent,)) for name, decoder in decoders.items()},
        turns=settings.turns,
        on_turn=lambda turn: show_status(f"{turn} of {settings.turns} turns"),
    )
    record: dict[str, Any] = {"setting": setting.to_values(), "tokens": tokens, "unets": {}}
    for name, unet in unets.items():
        loop_ms = LOOP_STEPS[name] * times[name].median_ms
        if settings.loop:
            loop_ms = unet.loop_ms(LOOP_STEPS[name], model=model)
            logger.info(f"  {LOOP_STEPS[name]} steps of {name}: {loop_ms / 1000:.4g} s")
        costs = costs_of(architectures[name], tokens=tokens).total
        record["unets"][name] = {
            "step": times[name].to_values(),
            "loop": {"steps": LOOP_STEPS[name], "ms": loop_ms, "executed": settings.loop},
            "memory": {**footprints[name].to_values(), "unet_mb": footprints[name].unet_mb},
            "parameters": costs.parameters,
            "macs": costs.macs,
        }
    record["decoders"] = {
        name: {"time": times[name].to_values(), "parameters": parameters[name]} for name in decoders
    }
    return {**record, "ratios": {key: full / efficient for key, (full, efficient) in _values(record)}}


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each row's value for the original and the efficient networks."""
    names = {"unets": (ORIGIN, TABLE_3), "decoders": (FULL, HALF)}
    for key, (_, section, path, _) in _ROWS.items():
        original, efficient = (reduce(getitem, path, record[section][name]) for name in names[section])
        yield key, (original, efficient)


class _TimedUNet:
    """A UNet of random weights in the runtime."""

    def __init__(self, architecture: Architecture, *, settings: EfficiencySettings, tokens: int) -> None:
        backend = backend_of(settings)
        self._device = backend.device
        inputs = unet_inputs(settings, architecture, tokens=tokens)
        self._call = backend.runner(build_unet(architecture).eval(), inputs)
        # On the network's device and in its dtype, as a sampler keeps them: the copy is not part of a step.
        self._inputs = [tensor.to(device=backend.device, dtype=backend.dtype) for tensor in inputs]

    def step(self) -> None:
        """Run one pass to its end."""
        self._call(*self._inputs)
        self._wait()

    @torch.inference_mode()
    def loop_ms(self, steps: int, *, model: MeasuredModel) -> float:
        """Milliseconds of that many guided DDIM steps, after one for warm-up."""
        schedule, (z_t, _, c) = model.schedule, self._inputs

        def denoiser(z_t: Tensor, t: Tensor) -> Estimate:
            output = self._call(z_t.repeat(2, 1, 1, 1), t.repeat(2).to(c.dtype), c).float()
            uncond, cond = output.chunk(2)
            output = guide(cond=cond, uncond=uncond, w=_GUIDANCE)
            return schedule.estimate(output, z_t=z_t, t=t, prediction_type=model.prediction_type)

        noise, grid = z_t[: len(z_t) // 2].float(), time_grid(steps, schedule_steps=schedule.num_steps)
        # torch.compile may compile once more for the sampler's tensors.
        sample(denoiser, noise, grid=grid[:2], schedule=schedule)
        # CUDA runs asynchronously: without it the clock would start during the warm-up.
        self._wait()
        began = time.perf_counter()
        sample(denoiser, noise, grid=grid, schedule=schedule)
        self._wait()
        return 1000.0 * (time.perf_counter() - began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summary(record: Mapping[str, Any]) -> Iterator[str]:
    """The measurement as a table, beside the paper's ratios."""
    yield f"{'':32}{'original':>12}{'efficient':>12}{'times less':>12}{'the paper':>12}"
    for key, (original, efficient) in _values(record):
        label, _, _, unit = _ROWS[key]
        paper = f"{PAPER_RATIOS[key]:.3g}" if key in PAPER_RATIOS else ""
        ratio = record["ratios"][key]
        yield f"{label:32}{original / unit:12,.5g}{efficient / unit:12,.5g}{ratio:12.3g}{paper:>12}"
    yield "The paper's are SD-v1.5's; its 848M parameters are not those of its Table 3 (ARCHITECTURE.md)."
