"""The state that a training begins with on each worker, its networks sharded or whole."""

import copy

from torch import nn

from jobs.training.spec import Training
from snapfusion.training.fsdp import shard
from snapfusion.training.loop import NetworksObjective, new_state
from snapfusion.training.networks import MODEL
from snapfusion.training.state import TrainState


def initial_state(training: Training, *, sharded: bool = False) -> TrainState:
    """Create the state of a training at step 0.

    If it is `sharded`, all ranks call this at once; the training's own networks then stay whole, for its
    evaluation, and are frozen.
    """

    def copied(model: nn.Module) -> nn.Module:
        # The optimizer must be made of sharded parameters, so sharding comes first.
        whole = copy.deepcopy(model)
        return shard(whole, device=next(model.parameters()).device) if sharded else whole

    networks = training.networks
    objective = training.objective
    averages = objective.averages if isinstance(objective, NetworksObjective) else ()
    averaged = {name: copied(networks[name]) for name in averages}
    if sharded:
        networks, whole = {name: copied(model) for name, model in networks.items()}, networks
        for model in whole.values():
            model.requires_grad_(requires_grad=False)
    return new_state(
        networks[MODEL],
        settings=training.settings,
        others={name: (networks[name], settings) for name, (_, settings) in training.others.items()},
        averaged=averaged,
    )
