"""The training loop: batches in, an objective called, a state moved on. It knows neither tables nor Ray.

Where torch.distributed is up, each rank hands in its share of every global batch, and a model wrapped in
DistributedDataParallel or spread over the ranks (FSDP). Shares may differ in size, and the gradient is that
of the mean over all rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snapfusion.training.batch import Batch
from snapfusion.training.ema import Ema
from snapfusion.training.fsdp import full_tensor, set_gradient_sync
from snapfusion.training.learning_rate import learning_rate
from snapfusion.training.settings import LoopSettings
from snapfusion.training.state import TrainState

MAX_LISTED_IDS = 20
"""How many row ids an error lists at most."""


class Objective(Protocol):
    """What a training minimises."""

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """The loss of each row, float32 [B]. `model` must be called as a module, once."""
        ...


@runtime_checkable
class StatefulObjective(Objective, Protocol):
    """An objective that goes from step to step with something it has learnt of its losses."""

    def end_step(self) -> Mapping[str, float]:
        """Called on all ranks when the weights have been moved; gives figures, the same on all."""
        ...

    def values(self) -> dict[str, Any]:
        """What it carries between two steps, as JSON values."""
        ...

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what `values` gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        step: its number, counted from 1.
        loss: mean over the global batch.
        grad_norm: of the whole gradient, before clipping.
        learning_rate: its rate.
        seconds: wall time, waiting for data included.
        data_seconds: of which this rank waited for its batch.
        figures: what the objective says of its losses, if it does.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    data_seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


class UnusableStepError(ValueError):
    """A step that must not be taken; the weights are those before it.

    Attributes:
        step: its number, counted from 0.
        rows: ids of the rows to blame, of all ranks.
    """

    def __init__(self, reason: str, *, step: int, rows: list[str]) -> None:
        more = f" and {len(rows) - MAX_LISTED_IDS} more" if len(rows) > MAX_LISTED_IDS else ""
        super().__init__(f"{reason} rows {', '.join(rows[:MAX_LISTED_IDS])}{more}")
        self.step, self.rows = step, rows


class NonFiniteLossError(UnusableStepError):
    """A loss or gradient that is NaN or infinite."""


class DivergedError(UnusableStepError):
    """A loss above the limit that the settings give."""


def new_state(model: nn.Module, *, settings: LoopSettings) -> TrainState:
    """A training of `model` at step 0: AdamW, and the average where the settings want one."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    ema = Ema(model, decay=settings.ema_decay) if settings.ema_decay is not None else None
    return TrainState(model=model, optimizer=optimizer, ema=ema)


def train(
    state: TrainState,
    *,
    objective: Objective,
    batches: Iterator[Batch],
    settings: LoopSettings,
    micro_batch: int,
    wrapped: nn.Module | None = None,
    after_step: Callable[[StepResult], None] = lambda step: None,
) -> None:
    """Move `state` on to `settings.num_steps`; a state that is there already is left alone.

    Args:
        state: changed in place, after every step complete.
        objective: gives the loss of each row.
        batches: this rank's share of global batch `state.step`, `state.step` + 1, ...
        settings: the optimizer's.
        micro_batch: rows of one forward pass; a larger share is accumulated.
        wrapped: `state.model` wrapped for distribution, or None where there is one process.
        after_step: told about each step once the state is complete; saving is done there.

    Raises:
        NonFiniteLossError: on all ranks, naming the rows, if a loss or the gradient is NaN or infinite.
        DivergedError: likewise, if the mean loss is above `settings.max_loss`.
        ValueError: if the shares of a step are not `settings.global_batch` rows together.
    """
    state.model.train()
    carrying = objective if isinstance(objective, StatefulObjective) else None
    if carrying is not None and state.carried:
        carrying.restore(state.carried)
    while state.step < settings.num_steps:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        rate = learning_rate(
            state.step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            num_steps=settings.num_steps,
            decay=settings.decay,
        )
        loss = _accumulate(
            state,
            objective,
            batch,
            settings=settings,
            micro_batch=micro_batch,
            wrapped=wrapped or state.model,
        )
        grad_norm = _update(state, batch, settings=settings, rate=rate)
        figures: Mapping[str, float] = {}
        if carrying is not None:
            figures, state.carried = carrying.end_step(), carrying.values()
        seconds = time.perf_counter() - began
        after_step(
            StepResult(
                step=state.step,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=rate,
                seconds=seconds,
                data_seconds=waited,
                figures=figures,
            )
        )


def _accumulate(
    state: TrainState,
    objective: Objective,
    batch: Batch,
    *,
    settings: LoopSettings,
    micro_batch: int,
    wrapped: nn.Module,
) -> float:
    """The gradient of the mean loss over the global batch, left in the parameters; returns that mean."""
    device = next(state.model.parameters()).device
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=device)
    unusable = list[str]()
    pieces = list(batch.split(micro_batch))
    for piece in pieces:
        with _exchange(wrapped, gradients=piece is pieces[-1]):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = objective(wrapped, piece.to(device), step=state.step)
            _check_form(losses, piece)
            # DDP and FSDP take the mean over ranks; times their number, it is that over the whole batch.
            (losses.sum() * (_world_size() / settings.global_batch)).backward()
        total += losses.detach().double().sum()
        finite = losses.detach().isfinite().tolist()
        unusable += [row for row, good in zip(piece.ids, finite, strict=True) if not good]
    return _mean_over_ranks(total, unusable, batch=batch, step=state.step, settings=settings)


def _update(state: TrainState, batch: Batch, *, settings: LoopSettings, rate: float) -> float:
    """One step of the optimizer and of the average; returns the gradient's norm."""
    norm = float(full_tensor(nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_norm)))
    if not math.isfinite(norm):
        # The gradient is common to all ranks, and so is this verdict.
        reason = f"the gradient of step {state.step} is {norm}; the batch is"
        raise NonFiniteLossError(reason, step=state.step, rows=_of_all_ranks(list(batch.ids)))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # as large as the model, and done with
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.model, step=state.step)
    return norm


def _mean_over_ranks(
    total: Tensor, unusable: list[str], *, batch: Batch, step: int, settings: LoopSettings
) -> float:
    """The mean loss of the global batch; all ranks raise alike, so that none waits for another."""
    counts = torch.tensor([len(batch), len(unusable)], dtype=torch.float64, device=total.device)
    sums = torch.cat([total.view(1), counts])
    if _world_size() > 1:
        dist.all_reduce(sums)
    loss, all_rows, all_unusable = sums.tolist()
    if all_rows != settings.global_batch:
        raise ValueError(f"step {step} got {all_rows:.0f} rows; the global batch is {settings.global_batch}")
    if all_unusable:
        reason = f"the loss of step {step} is not finite in"
        raise NonFiniteLossError(reason, step=step, rows=_of_all_ranks(unusable))
    mean = float(loss / settings.global_batch)
    if settings.max_loss is not None and mean > settings.max_loss:
        reason = f"the loss of step {step} is {mean:.4g}, above max_loss {settings.max_loss:g}; the batch is"
        raise DivergedError(reason, step=step, rows=_of_all_ranks(list(batch.ids)))
    return mean


def _exchange(model: nn.Module, *, gradients: bool) -> AbstractContextManager[None]:
    """Ranks exchange gradients once a step, with the last piece of its batch."""
    set_gradient_sync(model, wanted=gradients)
    if isinstance(model, DistributedDataParallel) and not gradients:
        return model.no_sync()
    return nullcontext()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_form(losses: Tensor, batch: Batch) -> None:
    if losses.shape != (len(batch),) or losses.dtype != torch.float32:
        raise ValueError(
            f"the objective gave {losses.dtype} {list(losses.shape)}; float32 [{len(batch)}], "
            "the loss of each row, is needed"
        )


def _of_all_ranks(rows: list[str]) -> list[str]:
    """The ids of `rows`, those of all ranks in their order; called on all ranks at once."""
    if _world_size() == 1:
        return rows
    shares: list[list[str]] = [rows] * _world_size()
    dist.all_gather_object(shares, rows)
    return [row for share in shares for row in share]
