"""One stage of training: a loss as a function of the step, AdamW, and a checkpoint to resume from.

All random numbers of a step depend on (seed, stage, step), so a stage that is killed and resumed ends with
the same weights as one that is not (on the same machine with the same number of threads).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snapfusion.mini.scenes import HELD_OUT
from snapfusion.mini.training.settings import StageSettings
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.noise import noise_key

Progress = Callable[[str, int, int, float], None]
"""Called after each step with the stage's name, steps done, steps in all and the loss."""

_AVERAGE_DECAY = 0.999
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
_CURVE_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """A stage for `run_stage`.

    Attributes:
        name: of the stage, and of its checkpoint.
        identity: hash of everything that determines its weights; a checkpoint with another is refused.
        settings: samples, batch size and learning rate.
        module: whose parameters are trained, in place.
        loss: step -> scalar loss, with its graph.
        average: a copy of `module` that holds its exponential moving average; or None.
    """

    name: str
    identity: str
    settings: StageSettings
    module: nn.Module
    loss: Callable[[int], Tensor]
    average: nn.Module | None = None


def device_of(module: nn.Module) -> torch.device:
    """The device of `module`. Random numbers are drawn on the CPU, so that they do not depend on it."""
    return next(module.parameters()).device


def step_generator(*, seed: int, stage: str, step: int) -> torch.Generator:
    """The generator of all random numbers of one step."""
    return torch.Generator().manual_seed(noise_key("mini training", seed, stage, step))


def training_indexes(count: int, generator: torch.Generator) -> list[int]:
    """`count` scene indexes below `HELD_OUT`, all of different captions."""
    captions = torch.randperm(NUM_CAPTIONS, generator=generator)[:count]
    images = torch.randint(HELD_OUT // NUM_CAPTIONS, (count,), generator=generator)
    return [int(index) for index in images * NUM_CAPTIONS + captions]


def learning_rate(step: int, settings: StageSettings) -> float:
    """Linear warm-up over the first twentieth (at most 200 steps), times a cosine decay to zero."""
    warmup = max(1, min(200, settings.steps // 20))
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
    return settings.lr * min(1.0, (step + 1) / warmup) * cosine


def run_stage(
    stage: TrainingStage, *, folder: Path, checkpoint_every: int, on_progress: Progress | None = None
) -> list[tuple[int, float]]:
    """Train `stage` to its end, from its checkpoint in `folder` if there is one.

    Returns:
        The loss curve: (step, mean loss since the previous point).

    Raises:
        ValueError: if the checkpoint has another identity.
    """
    optimizer = torch.optim.AdamW(
        stage.module.parameters(), lr=stage.settings.lr, weight_decay=_WEIGHT_DECAY, fused=True
    )
    path, steps = folder / f"{stage.name}.safetensors", stage.settings.steps
    checkpoint = _Checkpoint(path=path, stage=stage, optimizer=optimizer)
    start, curve = checkpoint.restore() if path.exists() else (0, [])
    stage.module.train()
    interval, losses = max(1, steps // _CURVE_POINTS), []
    for step in range(start, steps):
        loss = _train_step(stage, step=step, optimizer=optimizer)
        losses.append(loss)
        if (step + 1) % interval == 0 or step + 1 == steps:
            curve.append((step + 1, sum(losses) / len(losses)))
            losses = []
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1, curve)
        if on_progress is not None:
            on_progress(stage.name, step + 1, steps, loss)
    stage.module.eval()
    return curve


def _train_step(stage: TrainingStage, *, step: int, optimizer: torch.optim.Optimizer) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, stage.settings)
    optimizer.zero_grad()
    loss = stage.loss(step)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(stage.module.parameters(), _CLIP_NORM)
    optimizer.step()
    if stage.average is not None:
        # The decay starts low, so that the average soon forgets the initial weights.
        decay = min(_AVERAGE_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            averages: list[Tensor] = list(stage.average.parameters())
            parameters: list[Tensor] = list(stage.module.parameters())
            torch._foreach_lerp_(averages, parameters, 1.0 - decay)
    return loss.item()


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """Module, average and optimizer in one safetensors file; step, identity and curve in its metadata."""

    path: Path
    stage: TrainingStage
    optimizer: torch.optim.Optimizer

    def save(self, step: int, curve: Sequence[tuple[int, float]]) -> None:
        """Write the state after `step` steps, with the loss curve so far."""
        tensors = {f"module.{name}": value for name, value in self.stage.module.state_dict().items()}
        if self.stage.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.stage.average.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        header = {"step": str(step), "identity": self.stage.identity, "curve": json.dumps(curve)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted write leaves the previous checkpoint intact.
        partial = self.path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=header)
        partial.replace(self.path)

    def restore(self) -> tuple[int, list[tuple[int, float]]]:
        """Load the state; return the steps done and the loss curve.

        Raises:
            ValueError: if it has another identity.
        """
        with safe_open(self.path, framework="pt") as file:
            header = file.metadata()
            if header["identity"] != self.stage.identity:
                raise ValueError(f"{self.path} was trained with other settings; give those or another folder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        self.stage.module.load_state_dict(_with_prefix(tensors, "module."))
        if self.stage.average is not None:
            self.stage.average.load_state_dict(_with_prefix(tensors, "average."))
        groups = self.optimizer.state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in _with_prefix(tensors, "optimizer.").items():
            number, name = path.split(".")
            state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(header["step"]), [(step, loss) for step, loss in json.loads(header["curve"])]


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
