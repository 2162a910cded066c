"""The training loop. It knows neither tables nor Ray.

Under torch.distributed each rank passes its share of every global batch, and networks wrapped in
DistributedDataParallel or sharded (FSDP). Shares may differ in size; the gradient is that of the mean over
all rows.

Of several networks a step trains one or some, by one loss; whose turn it is follows from the step.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snapfusion.training.batch import Batch
from snapfusion.training.fsdp import full_tensor, set_gradient_sync
from snapfusion.training.learning_rate import learning_rate
from snapfusion.training.networks import MODEL, Networks, TrainedNetwork, read_only, trained_network
from snapfusion.training.settings import LoopSettings, NetworkSettings
from snapfusion.training.state import StateError, TrainState
from snapfusion.training.trainable_state import trainable_outside

MAX_LISTED_IDS = 20
"""Most row ids that an error message lists."""


class Objective(Protocol):
    """A loss to minimise."""

    def __call__(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row, float32 [B].

        `model` must be called as a module, once with a gradient.
        """


@runtime_checkable
class NetworksObjective(Protocol):
    """A loss of several networks, or one that reads averaged weights."""

    @property
    def averages(self) -> Collection[str]:
        """Names of the networks whose averages it reads."""

    def turn(self, step: int) -> tuple[str, ...]:
        """Return the names of the networks that a step trains: a function of the step alone.

        The step is reported under the first one.
        """

    def __call__(self, networks: Networks, batch: Batch, *, step: int) -> Tensor:
        """Return the loss of each row for the networks whose turn it is, float32 [B]; changes no network."""


AnyObjective = Objective | NetworksObjective


@runtime_checkable
class StatefulObjective(Protocol):
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
        network: name of the network that was trained; of several, the first.
        loss: mean over the global batch.
        grad_norm: norm of its whole gradient, before clipping.
        learning_rate: its rate.
        seconds: wall time, including the wait for data.
        data_seconds: time that this rank waited for its batch.
        metrics: of the objective, if it is stateful; and NAME/grad_norm of the other networks trained.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    data_seconds: float
    network: str = MODEL
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


def new_state(
    model: nn.Module,
    *,
    settings: LoopSettings,
    others: Mapping[str, tuple[nn.Module, NetworkSettings]] | None = None,
    averaged: Mapping[str, nn.Module] | None = None,
) -> TrainState:
    """Create the state of a training at step 0.

    Args:
        model: the network that is published.
        settings: of the loop and of the optimizer of `model`.
        others: the networks that are trained beside it, with their optimizers' settings, by name.
        averaged: copies of the networks, by name, that are to hold their averages; needed of those whose
            averages the objective reads.
    """
    networks = {MODEL: (model, settings), **(others or {})}
    return TrainState(
        networks={
            name: trained_network(
                network,
                settings=own,
                arithmetic=settings.arithmetic,
                averaged=(averaged or {}).get(name),
            )
            for name, (network, own) in networks.items()
        }
    )


def train(
    state: TrainState,
    *,
    objective: AnyObjective,
    batches: Iterator[Batch],
    settings: LoopSettings,
    micro_batch: int,
    wrapped: Mapping[str, nn.Module] | None = None,
    after_step: Callable[[StepResult], None] = lambda step: None,
) -> None:
    """Train `state` up to `settings.num_steps`; a finished state is left unchanged.

    Args:
        state: changed in place; complete after every step.
        objective: gives the loss of each row.
        batches: this rank's share of global batch `state.step`, `state.step` + 1, ...
        settings: of the loop.
        micro_batch: rows per forward pass; larger shares are accumulated.
        wrapped: the networks of `state` wrapped for distribution, by name; None for a single process.
        after_step: called after each step, when the state is complete and may be saved.

    Raises:
        NonFiniteLossError: on all ranks, naming the rows, if a loss or the gradient is NaN or infinite.
        DivergedError: likewise, if the mean loss is above `settings.max_loss`.
        StateError: if the objective carries weights to train that are none of the state's.
        ValueError: if the shares of a step do not add up to `settings.global_batch` rows.
    """
    bind = _bind(objective, state, wrapped=wrapped or {})
    for network in state.networks.values():
        network.model.train()
    stateful = objective if isinstance(objective, StatefulObjective) else None
    if stateful is not None and state.objective_state:
        stateful.load_state_dict(state.objective_state)
    while state.step < settings.num_steps:
        start = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - start
        step = bind(state.step)
        rates = step.learning_rates(num_steps=settings.num_steps)
        with read_only(step.others, averages=step.averages):
            losses = _accumulate(step, batch, settings=settings, micro_batch=micro_batch)
        loss, norms = _update(step, batch, losses, settings=settings, rates=rates)
        state.step += 1
        own_metrics: Mapping[str, float] = {}
        if stateful is not None:
            own_metrics, state.objective_state = stateful.end_step(), stateful.state_dict()
        first, *beside = norms
        after_step(
            StepResult(
                step=state.step,
                network=first,
                loss=loss,
                grad_norm=norms[first],
                learning_rate=rates[first],
                seconds=time.perf_counter() - start,
                data_seconds=data_seconds,
                metrics={f"{name}/grad_norm": norms[name] for name in beside} | dict(own_metrics),
            )
        )


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """The losses of this rank's share: their sum, float64 [], and which of them are finite, bool [B]."""

    total: Tensor
    finite: Tensor


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step: its number, the networks that it trains by a loss, and those that it may read."""

    number: int
    networks: Mapping[str, TrainedNetwork]
    models: Mapping[str, nn.Module]
    losses: Callable[[Batch], Tensor]
    others: Collection[TrainedNetwork] = ()
    averages: Collection[nn.Module] = ()

    def learning_rates(self, *, num_steps: int) -> dict[str, float]:
        """The rate of each network that the step trains, in a training of so many steps."""
        return {
            name: learning_rate(self.number, num_steps=num_steps, settings=network.settings)
            for name, network in self.networks.items()
        }


def _bind(
    objective: AnyObjective, state: TrainState, *, wrapped: Mapping[str, nn.Module]
) -> Callable[[int], _Step]:
    """Return the function that gives each step its networks and its loss."""
    networks = state.networks
    # The state holds bare networks, so that names of tensors do not depend on the number of ranks.
    models = {name: wrapped.get(name, network.model) for name, network in networks.items()}
    if (path := trainable_outside(objective, networks=[net.model for net in networks.values()])) is not None:
        raise StateError(
            f"{path} is trained and is none of the training's networks ({', '.join(networks)}), so a resumed "
            "run would lose it: add it to them, or freeze it with requires_grad_(False)"
        )
    if not isinstance(objective, NetworksObjective):
        if len(networks) > 1:
            raise StateError(f"the objective does not say whose turn a step is, of {', '.join(networks)}")

        def only(number: int) -> _Step:
            """The step of the only network."""
            losses = partial(objective, models[MODEL], step=number)
            return _Step(number=number, networks=networks, models=models, losses=losses)

        return only
    bare = {name: network.model for name, network in networks.items()}
    averages = {name: _averaged(networks, name) for name in objective.averages}

    def of_turn(number: int) -> _Step:
        """The step of the networks whose turn it is; the others, and averages, are read."""
        turn = objective.turn(number)
        for name in turn:
            if name not in networks:
                raise StateError(f"step {number} trains {name!r}; the networks are {', '.join(networks)}")
        trained = {name: models[name] for name in turn}
        return _Step(
            number=number,
            networks={name: networks[name] for name in turn},
            models=trained,
            losses=partial(objective, Networks(trained=trained, bare=bare, averages=averages), step=number),
            others=[network for name, network in networks.items() if name not in turn],
            averages=averages.values(),
        )

    return of_turn


def _averaged(networks: Mapping[str, TrainedNetwork], name: str) -> nn.Module:
    """The module with the averaged weights of a network."""
    ema = networks[name].ema if name in networks else None
    if ema is None or ema.module is None:
        raise StateError(f"the objective reads the averaged weights of {name!r}, which the state has not")
    return ema.module


def _accumulate(step: _Step, batch: Batch, *, settings: LoopSettings, micro_batch: int) -> _Losses:
    """Accumulate the gradient of the mean loss over the global batch; does not wait for the device."""
    for network in step.networks.values():
        network.optimizer.zero_grad(set_to_none=True)
    device = next(network.model.parameters()).device
    # Summed in float64, so that the reported mean hardly depends on how rows are split.
    total = torch.zeros((), dtype=torch.float64, device=device)
    finite = list[Tensor]()
    pieces = list(batch.split(micro_batch))
    for piece in pieces:
        with _sync_gradients(step.models.values(), enabled=piece is pieces[-1]):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = step.losses(piece.to(device))
            _check_losses(losses, piece)
            # DDP and FSDP average gradients over ranks: scaled by their number, it is the mean over all rows.
            (losses.sum() * (_world_size() / settings.global_batch)).backward()
        total += losses.detach().double().sum()
        finite.append(losses.detach().isfinite())
    return _Losses(total=total, finite=torch.cat(finite))


def _update(
    step: _Step, batch: Batch, losses: _Losses, *, settings: LoopSettings, rates: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Update the networks that the step trains; return the mean loss and the norm of each one's gradient."""
    total = losses.total
    sums = torch.stack([total, torch.full_like(total, len(batch)), (~losses.finite).sum().double()])
    if _world_size() > 1:
        dist.all_reduce(sums)
    clipped = [
        full_tensor(nn.utils.clip_grad_norm_(network.model.parameters(), network.settings.clip_norm)).double()
        for network in step.networks.values()
    ]
    # Read together: each read makes the host wait for the device. Checks, logs and reports need no other.
    values = torch.cat([sums, torch.stack(clipped)]).tolist()
    loss = _mean_over_ranks(values[:3], losses, batch=batch, step=step.number, settings=settings)
    norms = dict(zip(step.networks, values[3:], strict=True))
    # All of them before any is updated: an error leaves the weights of the step before.
    for norm in norms.values():
        if not math.isfinite(norm):
            # All ranks have the same gradient, so all of them raise.
            reason = f"the gradient of step {step.number} is {norm}; the batch is"
            raise NonFiniteLossError(reason, step=step.number, rows=_gather_ids(list(batch.ids)))
    for name, network in step.networks.items():
        network.update(rate=rates[name])
    return loss, norms


def _mean_over_ranks(
    sums: Sequence[float], losses: _Losses, *, batch: Batch, step: int, settings: LoopSettings
) -> float:
    """Return the mean loss of the global batch; `sums` over ranks are of losses, rows and unusable rows."""
    # Every error is raised on all ranks, from reduced values: a rank that raised alone would leave the others
    # waiting in the next collective.
    loss, all_rows, all_unusable = sums
    if all_rows != settings.global_batch:
        raise ValueError(f"step {step} got {all_rows:.0f} rows; the global batch is {settings.global_batch}")
    if all_unusable:
        reason = f"the loss of step {step} is not finite in"
        finite = losses.finite.tolist()
        unusable = [row for row, good in zip(batch.ids, finite, strict=True) if not good]
        raise NonFiniteLossError(reason, step=step, rows=_gather_ids(unusable))
    mean = float(loss / settings.global_batch)
    if settings.max_loss is not None and mean > settings.max_loss:
        reason = f"the loss of step {step} is {mean:.4g}, above max_loss {settings.max_loss:g}; the batch is"
        raise DivergedError(reason, step=step, rows=_gather_ids(list(batch.ids)))
    return mean


@contextmanager
def _sync_gradients(models: Iterable[nn.Module], *, enabled: bool) -> Iterator[None]:
    """Reduce gradients over ranks only if enabled: once per step, with the last piece of the batch."""
    with ExitStack() as stack:
        for model in models:
            set_gradient_sync(model, enabled=enabled)
            if isinstance(model, DistributedDataParallel) and not enabled:
                stack.enter_context(model.no_sync())
        yield


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
