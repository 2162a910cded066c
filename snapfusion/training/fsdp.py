"""A network spread over workers (FSDP), and whole tensors made of the pieces and pieces of whole ones.

Where nothing is spread, a tensor is whole already, and all of this gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Spread the parameters of `model` over all ranks, which call this at once; it is changed in place.

    Each block of its lists of blocks is gathered by itself as it is used, and what is left as the whole.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in model.children():
        for block in part if isinstance(part, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def set_gradient_sync(model: nn.Module, *, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, if `model` is spread over them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor of which `tensor` may be this rank's piece; called on all ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`full_tensor` of each, on rank 0; the others, which call this at once, are left with what was not spread.

    What was spread ends on the CPU, as there may be no room for all of it elsewhere. It is gathered by order
    of names: the order in `named` may differ from rank to rank, as a file of safetensors is read in any, and
    gloo ends a process that is sent a piece of another tensor.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = {name: tensor for name, tensor in named.items() if not isinstance(tensor, DTensor)}
    for name in sorted(named.keys() - gathered.keys()):
        tensor = full_tensor(named[name])
        if first:
            gathered[name] = tensor.cpu()
    return gathered


def distribute_like(tensor: Tensor, given: Tensor) -> Tensor:
    """A whole `tensor` spread as `given` is, where `given` is spread; all ranks have the same."""
    if not isinstance(given, DTensor):
        return tensor
    there = tensor.to(given.device)
    return distribute_tensor(there, given.device_mesh, given.placements, src_data_rank=None)


def load_full_state_dict(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors into a network that may be spread."""
    own = model.state_dict()
    model.load_state_dict(
        {name: distribute_like(tensor, own.get(name, tensor)) for name, tensor in weights.items()}
    )
