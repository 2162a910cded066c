"""The most that a network's worker holds: tensors counted on shapes as they come and go, without a device.

Counted in the networks' own dtype. Attention is taken for the fused kind, whose matrix of scores is never
whole. What an allocator loses between tensors is not in it (`ALLOCATOR_SLACK`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.planning.forecast import PeakMemory
from jobs.planning.sizes import ModelSizes
from snapfusion.models.architecture import Architecture
from snapfusion.models.decoder import DecoderConfig, HalfDecoder
from snapfusion.models.unet import BlockUNet

ALLOCATOR_SLACK = 1.2
"""By which activations are multiplied: an allocator's gaps, and norms that a GPU's autocast keeps in float32.

An assumption: no GPU was at hand to measure it."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_COUNTED_IN = torch.bfloat16
_FLOAT = 4


class _Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, known

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
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Fused(torch.autograd.Function):
    """Fused attention's shapes, and what it keeps for its backward pass."""

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
    """On the meta device torch takes attention apart, which no accelerator does."""
    own = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Fused.apply(q, k, v)
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


def _peak_bytes(network: nn.Module, run: Callable[[], Tensor], *, trained: bool) -> int:
    """Bytes of tensors, weights and gradients apart, at the highest while `run` goes on."""
    network.requires_grad_(trained).train(trained)
    known = set[int]()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if trained else None
        known |= {one.untyped_storage()._cdata for one in (parameter, parameter.grad) if one is not None}
    live = _Live(known | {buffer.untyped_storage()._cdata for buffer in network.buffers()})
    with _fused_attention(), torch.set_grad_enabled(trained), live:
        output = run()
        if trained:
            output.float().pow(2).mean().backward()
    return live.peak


@functools.lru_cache(maxsize=64)
def unet_bytes(architecture: Architecture, *, tokens: int, trained: bool, checkpointing: bool = False) -> int:
    """Of activations in two bytes, for one latent that goes through a UNet, and back if it is trained."""
    with torch.device("meta"):
        unet = BlockUNet.of(architecture).to(_COUNTED_IN)
        side, told = architecture.sample_size, architecture.guidance_embedding
        z = torch.empty(1, architecture.in_channels, side, side, dtype=_COUNTED_IN)
        c = torch.empty(1, tokens, architecture.context, dtype=_COUNTED_IN)
        heard = None if told is None else torch.empty(1, told, dtype=_COUNTED_IN)
        time = torch.zeros(1)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return _peak_bytes(
        unet,
        lambda: unet(z, time, encoder_hidden_states=c, timestep_cond=heard).sample,
        trained=trained,
    )


@functools.lru_cache(maxsize=8)
def vae_bytes(sizes: ModelSizes) -> int:
    """Of activations in two bytes, for one picture that goes through the VAE's encoder or decoder."""
    bundle, side = sizes.bundle, sizes.bundle.image_size
    with torch.device("meta"):
        vae = bundle.vae.to(_COUNTED_IN)
        picture = torch.empty(1, 3, side, side, dtype=_COUNTED_IN)
        latent = torch.empty(1, *bundle.latent_shape, dtype=_COUNTED_IN)
    return max(
        _peak_bytes(vae, lambda: vae.encode(picture).latent_dist.mean, trained=False),
        _peak_bytes(vae, lambda: vae.decode(latent).sample, trained=False),
    )


@functools.lru_cache(maxsize=8)
def half_decoder_bytes(sizes: ModelSizes) -> int:
    """Of activations in two bytes, for one latent through the half-width decoder and back."""
    with torch.device("meta"):
        decoder = HalfDecoder(DecoderConfig.half_of(sizes.bundle.vae)).to(_COUNTED_IN)
        latent = torch.empty(1, *sizes.bundle.latent_shape, dtype=_COUNTED_IN)
    return _peak_bytes(decoder, lambda: decoder(latent), trained=True)


def training_memory(
    *,
    parameters: int,
    frozen: int,
    frozen_bytes: int,
    row_bytes: int,
    rows: int,
    precision: str,
    moment_bytes: float,
    averaged: bool,
    workers: int,
    spread: bool,
) -> PeakMemory:
    """Of one worker of a training.

    Args:
        parameters: of what is trained, in float32: weights, gradients, and the average if one is kept.
        frozen: parameters beside it that are not trained, in float32: text encoder and VAE.
        frozen_bytes: of further networks: the teacher.
        row_bytes: of one row's activations in two bytes.
        rows: in one forward pass.
        precision: of the forward pass.
        moment_bytes: of the optimizer's moments, a parameter.
        averaged: whether an average is kept.
        workers: that exchange gradients.
        spread: whether they spread weights, gradients, moments and average (FSDP), each keeping the first
            weights whole; else each exchanges through buckets as large as the gradients (DDP).
    """
    states = 2 * _FLOAT + moment_bytes + (_FLOAT if averaged else 0)
    if spread and workers > 1:
        kept = parameters * (states / workers + _FLOAT)
    else:
        kept = parameters * (states + (_FLOAT if workers > 1 else 0))
    autocast = precision != "float32"
    casts = parameters * DTYPE_BYTES[precision] if autocast else 0
    passing = casts + rows * row_bytes * (1 if autocast else 2) * ALLOCATOR_SLACK
    # AdamW goes through all parameters at once, with one more copy of them; activations are gone by then.
    updating = parameters * _FLOAT / (workers if spread else 1)
    return PeakMemory(networks=kept + frozen * _FLOAT + frozen_bytes, activations=max(passing, updating))


def network_memory(*, parameters: int, dtype: str, row_bytes: int, rows: int) -> PeakMemory:
    """Of one worker that only asks networks, all of them in one dtype."""
    size = DTYPE_BYTES[dtype]
    return PeakMemory(networks=parameters * size, activations=rows * row_bytes * size / 2 * ALLOCATOR_SLACK)
