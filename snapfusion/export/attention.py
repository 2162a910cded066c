"""Cross-attention blocks as a phone's accelerator likes them: channels before positions, from end to end.

diffusers computes a `Transformer2DModel` on [B,S,C], for which every block is transposed on the way in, for
each head, and on the way out. Here the same block runs on [B,C,1,S]: its linear layers are 1x1 convolutions,
its heads are a view of the channels, and its products say which side is transposed, so nothing is moved. The
softmax runs over keys in the last but one place. S = h w positions, L tokens, C channels, d = C / heads.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from snapfusion.export.settings import AttentionLayout


def set_attention_layout(network: nn.Module, *, form: AttentionLayout) -> None:
    """Put every cross-attention block of `network` into that form, in place; the weights are shared.

    Raises:
        ValueError: if an attention block is of a kind that Stable Diffusion v1 and v2 have not.
    """
    if form == "diffusers":
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Transformer2DModel):
                parent.register_module(name, ChannelsFirstTransformer(child, split=form == "split-heads"))


class ChannelsFirstTransformer(nn.Module):
    """A `Transformer2DModel` on [B,C,1,S]; called as that is.

    Args:
        block: whose weights are used.
        split: whether heads are computed one after the other: more operations, of which the largest result
            is smaller by the number of heads.
    """

    def __init__(self, block: Transformer2DModel, *, split: bool) -> None:
        super().__init__()
        (inner,) = block.transformer_blocks
        self.norm = block.norm
        self.proj_in, self.proj_out = _as_conv(block.proj_in), _as_conv(block.proj_out)
        self.norm1, self.norm2, self.norm3 = (
            ChannelLayerNorm(norm) for norm in (inner.norm1, inner.norm2, inner.norm3)
        )
        self.attn1, self.attn2 = (
            ChannelsFirstAttention(part, split=split) for part in (inner.attn1, inner.attn2)
        )
        self.gate, self.feed = _as_conv(inner.ff.net[0].proj), _as_conv(inner.ff.net[2])

    def forward(self, hidden: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        """[B,C,h,w] and c [B,L,D] to ([B,C,h,w],); a UNet's masks and the like are all None."""
        batch, height, width = hidden.shape[0], hidden.shape[2], hidden.shape[3]
        c = encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        x = self.proj_in(self.norm(hidden).reshape(batch, -1, 1, height * width))
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), c)
        value, gate = self.gate(self.norm3(x)).chunk(2, dim=1)
        x = x + self.feed(value * functional.gelu(gate))
        return (self.proj_out(x).reshape(hidden.shape) + hidden,)


class ChannelLayerNorm(nn.Module):
    """A LayerNorm over the channels of [B,C,1,S]."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,1,S] to the same."""
        centred = x - x.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        normed = centred * torch.rsqrt(variance + self.eps)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class ChannelsFirstAttention(nn.Module):
    """Attention of [B,C,1,S] to [B,D,1,L]."""

    def __init__(self, attention: Attention, *, split: bool) -> None:
        super().__init__()
        _check_attention(attention)
        self.heads, self.scale, self.split = attention.heads, attention.scale, split
        self.to_q, self.to_k, self.to_v = (
            _as_conv(part) for part in (attention.to_q, attention.to_k, attention.to_v)
        )
        self.to_out = _as_conv(attention.to_out[0])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B,C,1,S] and [B,D,1,L] to [B,C,1,S]."""
        # Scaled before the product, not after: the sums over d stay that much further from float16's end.
        q, k, v = (self._headed(part) for part in (self.to_q(x) * self.scale, self.to_k(c), self.to_v(c)))
        if self.split:
            each = zip(*(part.split(1, dim=1) for part in (q, k, v)), strict=True)
            found = torch.cat([_attention(q=q, k=k, v=v) for q, k, v in each], dim=1)
        else:
            found = _attention(q=q, k=k, v=v)
        return self.to_out(found.reshape(x.shape[0], -1, 1, x.shape[3]))

    def _headed(self, x: Tensor) -> Tensor:
        """[B,C,1,S] as [B,heads,d,S]."""
        return x.reshape(x.shape[0], self.heads, -1, x.shape[3])


def _attention(*, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B,heads,d,S] of queries to [B,heads,d,L] of keys and values."""
    weights = (k.transpose(2, 3) @ q).softmax(dim=2)
    return v @ weights


def _as_conv(layer: nn.Module) -> nn.Conv2d:
    """A linear layer as the 1x1 convolution that it is; a convolution as it stands."""
    if isinstance(layer, nn.Conv2d):
        return layer
    assert isinstance(layer, nn.Linear)  # noqa: S101 - diffusers has no other here
    made = nn.Conv2d(layer.in_features, layer.out_features, kernel_size=1, bias=layer.bias is not None)
    made.weight = nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)
    made.bias = layer.bias
    return made


def _check_attention(attention: Attention) -> None:
    unknown = [
        name
        for name in ("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")
        if getattr(attention, name, None) is not None
    ]
    if unknown or attention.residual_connection or attention.rescale_output_factor != 1.0:
        raise ValueError(
            f"an attention block has {unknown or 'a residual of its own'}; SD-v1's and v2's have none"
        )
