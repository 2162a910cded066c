"""Times a training step of each objective, and measures its memory and its waits for the device."""

import copy
import dataclasses
import gc
import itertools
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.gpu_check.settings import CheckSize
from jobs.planning.timings import noise_batch
from jobs.recipes.registry import recipe_named
from pipelines.loading.prefetch import Prefetcher
from pipelines.stages.device import DTYPES
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.gan_head import head_for
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.dmd2 import FAKE_SCORE, GAN_HEAD, Dmd2Objective
from snapfusion.training.lcm import LcmObjective
from snapfusion.training.loop import AnyObjective, StepResult, new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.robust import RobustObjective
from snapfusion.training.row_draws import draw_rows
from snapfusion.training.settings import (
    Dmd2Settings,
    LcmSettings,
    LoopSettings,
    NetworkSettings,
    PcmSettings,
    SkipSettings,
    TargetSettings,
    VelocitySettings,
)
from snapfusion.training.state import TrainState
from snapfusion.training.step_distillation import StepDistillationObjective
from snapfusion.training.velocity import VelocityObjective

_STEPS = 6
"""The first two, of which each network of DMD2 has one, initialize libraries."""
_CAPTION = "a picture of something"


def measure_training(size: CheckSize, folder: Path) -> dict[str, Any]:
    """A record of each objective, by its name."""
    del folder
    trainings, results = Trainings(size), dict[str, Any]()
    for name in OBJECTIVES:
        gc.collect()
        try:
            results[name] = trainings.measure(name)
        except torch.OutOfMemoryError as error:
            results[name] = {"skipped": f"it does not fit: {str(error).splitlines()[0]}"}
    return results


@dataclass(frozen=True, kw_only=True)
class _Method:
    """A training to measure: its network, objective, and what is trained or averaged beside."""

    model: nn.Module
    objective: AnyObjective
    others: dict[str, tuple[nn.Module, NetworkSettings]]
    averaged: dict[str, nn.Module]


class Trainings:
    """The trainings of one model, on noise, by the settings of a recipe."""

    def __init__(self, size: CheckSize) -> None:
        self.size, self.recipe = size, recipe_named(size.recipe, model=size.model)
        dtype = DTYPES[self.recipe.distill.teacher_dtype]
        self.teacher = load(size.model, device=size.device, dtype=dtype)
        model = load(size.model, device=size.device)
        # Students are copies of it, and the device's memory is theirs.
        self.unet: Any = model.unet.cpu()
        self.bundle = dataclasses.replace(model, unet=self.teacher.unet)
        self.captions = CaptionEncoder(self.bundle)

    def measure(self, name: str) -> dict[str, Any]:
        """Milliseconds of a step, by the network that it trains; on a GPU peak memory and waits, too."""
        cuda = self.size.device == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        method = OBJECTIVES[name](self)
        base = self.recipe.decoder.loop if name == "decoder" else self.recipe.distill.loop
        rows = self.size.rows
        # A rate this small keeps the weights, and so the loss, finite on noise.
        changes = {"global_batch": rows, "num_steps": _STEPS, "max_loss": None, "learning_rate": 1e-9}
        loop = base.model_copy(update={**changes, "ema_decay": 0.99 if method.averaged else None})
        state = new_state(method.model, settings=loop, others=method.others, averaged=method.averaged)
        seconds, waits = self._steps(state, method.objective, loop=loop)
        return {
            "ms": {network: 1e3 * statistics.median(times) for network, times in seconds.items()},
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
            "waits": waits,
        }

    def _steps(
        self, state: TrainState, objective: AnyObjective, *, loop: LoopSettings
    ) -> tuple[dict[str, list[float]], float | None]:
        """Seconds of each step by network, and how often a step waits for the device."""
        seconds, batch = defaultdict[str, list[float]](list), self._batch()

        def record(step: StepResult) -> None:
            if step.step > 2:
                seconds[step.network].append(step.seconds)

        prepared = (draw_rows(objective, batch, step=step) for step in itertools.count())
        with closing(Prefetcher(prepared, depth=2)) as batches, _counted_waits(self.size) as waits:
            train(
                state,
                objective=objective,
                batches=batches,
                settings=loop,
                micro_batch=self.size.rows,
                after_step=record,
            )
        return dict(seconds), len(waits) / _STEPS if self.size.device == "cuda" else None

    def _batch(self) -> Batch:
        rows, side = self.size.rows, self.bundle.image_size
        images = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
        token_ids = self.bundle.tokenize([_CAPTION] * rows)
        return noise_batch(self.bundle, rows, token_ids=token_ids, image=images)

    def student(self, *, w_conditioned: bool = False) -> nn.Module:
        """A copy of the model's UNet, to be trained."""
        unet = copy.deepcopy(self.unet).to(self.size.device)
        if w_conditioned:
            unet = with_guidance_embedding(unet)
        if self.recipe.distill.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet.requires_grad_(requires_grad=True)

    def targets(self, settings: TargetSettings) -> OnlineTargets:
        """The teacher's."""
        return OnlineTargets(self.teacher, captions=self.captions, settings=settings, seed=0)


def _method(model: nn.Module, objective: AnyObjective, **beside: Any) -> _Method:  # noqa: ANN401
    return _Method(model=model, objective=objective, **{"others": {}, "averaged": {}, **beside})


def _velocity(trainings: Trainings) -> VelocityObjective:
    schedule = trainings.bundle.schedule
    return VelocityObjective(VelocitySettings(), captions=trainings.captions, schedule=schedule, seed=0)


def _robust(trainings: Trainings) -> _Method:
    objective = RobustObjective(_velocity(trainings), settings=SkipSettings(), seed=0)
    return _method(trainings.student(), objective)


def _steps(trainings: Trainings, **changes: Any) -> _Method:  # noqa: ANN401 - settings
    settings = trainings.recipe.distill.steps.model_copy(update=changes)
    objective = StepDistillationObjective(
        settings,
        targets=trainings.targets(settings),
        captions=trainings.captions,
        schedule=trainings.bundle.schedule,
        seed=0,
    )
    return _method(trainings.student(w_conditioned=settings.w_conditioned), objective)


def _lcm(trainings: Trainings) -> _Method:
    settings, schedule = LcmSettings(), trainings.bundle.schedule
    objective = LcmObjective(settings, targets=trainings.targets(settings.targets), schedule=schedule)
    student = trainings.student(w_conditioned=True)
    return _method(student, objective, averaged={MODEL: copy.deepcopy(student)})


def _pcm(trainings: Trainings) -> _Method:
    settings, schedule = PcmSettings(), trainings.bundle.schedule
    objective = PcmObjective(settings, targets=trainings.targets(settings.targets), schedule=schedule)
    return _method(trainings.student(), objective)


def _dmd2(trainings: Trainings) -> _Method:
    # In turns of one step each, so that both are timed.
    settings = Dmd2Settings(fake_updates=1)
    objective = Dmd2Objective(settings, teacher=trainings.teacher, captions=trainings.captions, seed=0)
    fake: Any = trainings.student()
    network = NetworkSettings(learning_rate=1e-9, ema_decay=None)
    others = {FAKE_SCORE: (fake, network), GAN_HEAD: (head_for(fake, seed=0), network)}
    return _method(trainings.student(), objective, others=others)


def _decoder(trainings: Trainings) -> _Method:
    return _method(HalfDecoder.from_vae(trainings.bundle.vae), DecoderObjective(stored_images))


OBJECTIVES: dict[str, Callable[[Trainings], _Method]] = {
    "velocity": lambda trainings: _method(trainings.student(), _velocity(trainings)),
    "robust": _robust,
    "vanilla": lambda trainings: _steps(trainings, cfg_probability=0.0),
    "CFG-aware": lambda trainings: _steps(trainings, cfg_probability=1.0),
    "w-conditioned": lambda trainings: _steps(trainings, cfg_probability=1.0, w_conditioned=True),
    "LCM": _lcm,
    "PCM": _pcm,
    "DMD2": _dmd2,
    "decoder": _decoder,
}
"""What is trained, by the objective's name."""


@contextmanager
def _counted_waits(size: CheckSize) -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of torch, one for each time that the host waits for a CUDA device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        if size.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if size.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
