"""Counts the peak activation bytes of a network on torch's meta device, without weights or an accelerator.

Counted in bfloat16, two bytes a number. Attention counts as the fused kernel, whose score matrix is never
materialized. What an allocator loses to fragmentation is not included.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import block_unet

_DTYPE = torch.bfloat16


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages alive now, and their peak."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, ignored

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        # Views and in-place results share a storage that is counted already.
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _FusedAttention(torch.autograd.Function):
    """Shapes of fused attention, and the tensors it saves for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, result)
        return result

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        q, k, v, _result = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def _fused_attention() -> Iterator[None]:
    # On the meta device torch decomposes attention into its score matrix, which no accelerator does.
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def peak_bytes(
    network: nn.Module,
    run: Callable[[], Tensor],
    *,
    trained: bool,
    trained_part: nn.Module | None = None,
) -> int:
    """Peak bytes of tensors other than weights and gradients while `run` calls the network.

    Args:
        network: on any device, the meta device included.
        run: the forward pass.
        trained: whether a backward pass follows.
        trained_part: the part of the network that is trained then; None for all of it.
    """
    network.requires_grad_(requires_grad=False).train(trained)
    (trained_part or network).requires_grad_(trained)
    ignored = {buffer.untyped_storage()._cdata for buffer in network.buffers()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        ignored |= {one.untyped_storage()._cdata for one in (parameter, parameter.grad) if one is not None}
    live = _LiveBytes(ignored)
    with _fused_attention(), torch.set_grad_enabled(trained), live:
        output = run()
        if trained:
            output.float().pow(2).mean().backward()
    return live.peak


def unet_pass(unet: nn.Module, architecture: Architecture, *, tokens: int) -> Callable[[], Tensor]:
    """A pass of a UNet of this architecture for one latent, in its dtype, on the meta device.

    Args:
        unet: on that device.
        architecture: of the UNet.
        tokens: of an encoded caption.
    """
    with torch.device("meta"):
        dtype = next(unet.parameters()).dtype
        side, width = architecture.sample_size, architecture.guidance_embedding
        z = torch.empty(1, architecture.in_channels, side, side, dtype=dtype)
        c = torch.empty(1, tokens, architecture.context, dtype=dtype)
        w = None if width is None else torch.empty(1, width, dtype=dtype)
        t = torch.zeros(1)

    def run() -> Tensor:
        sample: Tensor = unet(z, t, encoder_hidden_states=c, timestep_cond=w).sample
        return sample

    return run


@functools.lru_cache(maxsize=64)
def unet_bytes(architecture: Architecture, *, tokens: int, trained: bool, checkpointing: bool = False) -> int:
    """Peak activation bytes for one latent through a UNet, and back if it is trained.

    Args:
        architecture: of the UNet.
        tokens: of an encoded caption.
        trained: whether a backward pass follows.
        checkpointing: whether activations are computed again in the backward pass.
    """
    with torch.device("meta"):
        unet = block_unet(architecture).to(_DTYPE)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return peak_bytes(unet, unet_pass(unet, architecture, tokens=tokens), trained=trained)
