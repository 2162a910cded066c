"""The training loop. It knows neither tables nor Ray.

Under torch.distributed each rank passes its share of every global batch, and a model wrapped in
DistributedDataParallel or sharded (FSDP). Shares may differ in size; the gradient is that of the mean over
all rows.
"""

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
"""Most row ids that an error message lists."""


class Objective(Protocol):
    """A loss to minimise."""

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B]. `model` must be called as a module, once."""


@runtime_checkable
class StatefulObjective(Objective, Protocol):
    """An objective with a state between steps, such as moving averages of its losses."""

    def end_step(self) -> Mapping[str, float]:
        """Update the state, on all ranks, after the weights; return metrics, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        step: its number, counted from 1.
        loss: mean over the global batch.
        grad_norm: norm of the whole gradient, before clipping.
        learning_rate: its rate.
        seconds: wall time, including the wait for data.
        data_seconds: time that this rank waited for its batch.
        metrics: of the objective, if it is stateful.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    data_seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class UnusableStepError(ValueError):
    """A step that must not be taken; the weights are those before it.

    Attributes:
        step: its number, counted from 0.
        rows: ids of the rows that caused it, on all ranks.
    """

    def __init__(self, reason: str, *, step: int, rows: list[str]) -> None:
        more = f" and {len(rows) - MAX_LISTED_IDS} more" if len(rows) > MAX_LISTED_IDS else ""
        super().__init__(f"{reason} rows {', '.join(rows[:MAX_LISTED_IDS])}{more}")
        self.step, self.rows = step, rows


class NonFiniteLossError(UnusableStepError):
    """A loss or gradient that is NaN or infinite."""


class DivergedError(UnusableStepError):
    """A mean loss above `LoopSettings.max_loss`."""


def new_state(model: nn.Module, *, settings: LoopSettings) -> TrainState:
    """Create the state of `model` at step 0, with AdamW and, if the settings ask for it, an average."""
    fused = settings.arithmetic > 1
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
    )
    ema = None
    if settings.ema_decay is not None:
        ema = Ema(model, decay=settings.ema_decay, of_run=fused)
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
    """Train `state` up to `settings.num_steps`; a finished state is left unchanged.

    Args:
        state: changed in place; complete after every step.
        objective: gives the loss of each row.
        batches: this rank's share of global batch `state.step`, `state.step` + 1, ...
        settings: of the optimizer.
        micro_batch: rows per forward pass; larger shares are accumulated.
        wrapped: `state.model` wrapped for distribution, or None for a single process.
        after_step: called after each step, when the state is complete and may be saved.

    Raises:
        NonFiniteLossError: on all ranks, naming the rows, if a loss or the gradient is NaN or infinite.
        DivergedError: likewise, if the mean loss is above `settings.max_loss`.
        ValueError: if the shares of a step do not add up to `settings.global_batch` rows.
    """
    state.model.train()
    # The state holds the bare network, so that names of tensors do not depend on the number of ranks.
    model = wrapped or state.model
    stateful = objective if isinstance(objective, StatefulObjective) else None
    if stateful is not None and state.objective_state:
        stateful.load_state_dict(state.objective_state)
    while state.step < settings.num_steps:
        start = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - start
        rate = learning_rate(state.step, settings=settings)
        loss = _accumulate(state, objective, batch, settings=settings, micro_batch=micro_batch, model=model)
        grad_norm = _update(state, batch, settings=settings, rate=rate)
        metrics: Mapping[str, float] = {}
        if stateful is not None:
            metrics, state.objective_state = stateful.end_step(), stateful.state_dict()
        result = StepResult(
            step=state.step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
            metrics=metrics,
        )
        after_step(result)


def _accumulate(
    state: TrainState,
    objective: Objective,
    batch: Batch,
    *,
    settings: LoopSettings,
    micro_batch: int,
    model: nn.Module,
) -> float:
    """Accumulate the gradient of the mean loss over the global batch; return that mean."""
    device = next(state.model.parameters()).device
    state.optimizer.zero_grad(set_to_none=True)
    # Summed in float64, so that the reported mean hardly depends on how rows are split.
    total = torch.zeros((), dtype=torch.float64, device=device)
    unusable = list[str]()
    pieces = list(batch.split(micro_batch))
    for piece in pieces:
        with _sync_gradients(model, enabled=piece is pieces[-1]):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = objective(model, piece.to(device), step=state.step)
            _check_losses(losses, piece)
            # DDP and FSDP average gradients over ranks: scaled by their number, it is the mean over all rows.
            (losses.sum() * (_world_size() / settings.global_batch)).backward()
        total += losses.detach().double().sum()
        # Collected over all pieces before an error is raised, so that it names every bad row of the batch.
        finite = losses.detach().isfinite().tolist()
        unusable += [row for row, good in zip(piece.ids, finite, strict=True) if not good]
    return _mean_over_ranks(total, unusable, batch=batch, step=state.step, settings=settings)


def _update(state: TrainState, batch: Batch, *, settings: LoopSettings, rate: float) -> float:
    """Take one step of the optimizer and of the average; return the norm of the gradient."""
    norm = float(full_tensor(nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_norm)))
    if not math.isfinite(norm):
        # All ranks have the same gradient, so all of them raise.
        reason = f"the gradient of step {state.step} is {norm}; the batch is"
        raise NonFiniteLossError(reason, step=state.step, rows=_gather_ids(list(batch.ids)))
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # frees as much memory as the model takes
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.model, step=state.step)
    return norm


def _mean_over_ranks(
    total: Tensor, unusable: list[str], *, batch: Batch, step: int, settings: LoopSettings
) -> float:
    """Return the mean loss of the global batch."""
    # Every error is raised on all ranks, from reduced values: a rank that raised alone would leave the others
    # waiting in the next collective.
    counts = torch.tensor([len(batch), len(unusable)], dtype=torch.float64, device=total.device)
    sums = torch.cat([total.view(1), counts])
    if _world_size() > 1:
        dist.all_reduce(sums)
    loss, all_rows, all_unusable = sums.tolist()
    if all_rows != settings.global_batch:
        raise ValueError(f"step {step} got {all_rows:.0f} rows; the global batch is {settings.global_batch}")
    if all_unusable:
        reason = f"the loss of step {step} is not finite in"
        raise NonFiniteLossError(reason, step=step, rows=_gather_ids(unusable))
    mean = float(loss / settings.global_batch)
    if settings.max_loss is not None and mean > settings.max_loss:
        reason = f"the loss of step {step} is {mean:.4g}, above max_loss {settings.max_loss:g}; the batch is"
        raise DivergedError(reason, step=step, rows=_gather_ids(list(batch.ids)))
    return mean


def _sync_gradients(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Reduce gradients over ranks only if enabled: once per step, with the last piece of the batch."""
    set_gradient_sync(model, enabled=enabled)
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_losses(losses: Tensor, batch: Batch) -> None:
    if losses.shape != (len(batch),) or losses.dtype != torch.float32:
        raise ValueError(
            f"the objective gave {losses.dtype} {list(losses.shape)}; float32 [{len(batch)}], "
            "the loss of each row, is needed"
        )


def _gather_ids(rows: list[str]) -> list[str]:
    """Concatenate the row ids of all ranks in rank order; called on all ranks at once."""
    if _world_size() == 1:
        return rows
    shares: list[list[str]] = [rows] * _world_size()
    dist.all_gather_object(shares, rows)
    return [row for share in shares for row in share]
