"""FSDP: sharding a network over workers, and conversion between full and sharded tensors.

On a network that is not sharded, every function here is the identity.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Shard the parameters of `model` over all ranks, in place; called on all ranks at once.

    Each block of its lists of blocks is one FSDP unit, and the rest of the network another.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # One unit per block: its parameters are gathered for its own forward pass, and freed after it.
    for part in model.children():
        for block in part if isinstance(part, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def set_gradient_sync(model: nn.Module, *, enabled: bool) -> None:
    """Set whether the next backward pass reduces gradients over ranks, if `model` is sharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of `model`, if it is sharded.

    A forward pass without a backward pass leaves the outermost ones gathered, and a later pass would take
    them as they are, without the updates since then.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor of a shard; called on all ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the full tensors, on rank 0 only; called on all ranks at once.

    Other ranks keep only the tensors that were not sharded. Gathered tensors are moved to the CPU, since the
    whole model may not fit on the device.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {name: tensor for name, tensor in named.items() if not isinstance(tensor, DTensor)}
    # Sorted, because the order in `named` may differ between ranks (a safetensors file is read in any order),
    # and gloo aborts a process that receives a shard of another tensor.
    for name in sorted(named.keys() - gathered.keys()):
        tensor = full_tensor(named[name])
        if is_first:
            gathered[name] = tensor.cpu()
    return gathered


def distribute_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Shard a full `tensor` as `reference` is sharded; all ranks hold the same full tensor."""
    if not isinstance(reference, DTensor):
        return tensor
    local = tensor.to(reference.device)
    # No broadcast from a source rank: every rank has read the same tensor.
    return distribute_tensor(local, reference.device_mesh, reference.placements, src_data_rank=None)


def load_full_state_dict(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full tensors into a network that may be sharded; errors as of `load_state_dict`."""
    own = model.state_dict()
    model.load_state_dict(
        {name: distribute_like(tensor, own.get(name, tensor)) for name, tensor in weights.items()}
    )
