"""Cross-attention blocks with channels before positions, the layout that phone accelerators prefer.

diffusers computes a `Transformer2DModel` on [B,S,C], which transposes every block's input, each head, and the
output. Here the same block runs on [B,C,1,S]: linear layers are 1x1 convolutions, heads are a view of the
channels, and matrix products state which side is transposed, so that no tensor is copied. The softmax runs
over the keys in the second to last dimension. S = h w positions, L tokens, C channels, d = C / heads.
"""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from snapfusion.export.settings import AttentionLayout


def set_attention_layout(network: nn.Module, *, layout: AttentionLayout) -> None:
    """Replace every cross-attention block of `network` in place by one of that layout; weights are shared.

    Raises:
        ValueError: if an attention block has parts that Stable Diffusion v1 and v2 do not have.
    """
    if layout == "diffusers":
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Transformer2DModel):
                block = ChannelsFirstTransformer(child, split=layout == "split-heads")
                parent.register_module(name, block)


class ChannelsFirstTransformer(nn.Module):
    """A `Transformer2DModel` computed on [B,C,1,S], with the same call signature.

    Args:
        block: whose weights are used.
        split: compute the heads one after the other: more operations, but the largest intermediate result is
            smaller by the number of heads.
    """

    # Converters name weights in the program after these attributes: renaming one changes the package's bytes.
    def __init__(self, block: Transformer2DModel, *, split: bool) -> None:
        super().__init__()
        (inner,) = block.transformer_blocks
        self.norm = block.norm
        self.proj_in, self.proj_out = _as_conv(block.proj_in), _as_conv(block.proj_out)
        self.norm1, self.norm2, self.norm3 = map(ChannelLayerNorm, (inner.norm1, inner.norm2, inner.norm3))
        self.attn1 = ChannelsFirstAttention(inner.attn1, split=split)
        self.attn2 = ChannelsFirstAttention(inner.attn2, split=split)
        self.gate, self.feed = _as_conv(inner.ff.net[0].proj), _as_conv(inner.ff.net[2])

    def forward(self, hidden: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        """[B,C,h,w] and c [B,L,D] to ([B,C,h,w],); the masks that a UNet passes are all None."""
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
    """LayerNorm over the channels of [B,C,1,S]."""

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
    """Multi-head attention from [B,C,1,S] to [B,D,1,L]."""

    def __init__(self, attention: Attention, *, split: bool) -> None:
        super().__init__()
        _check_attention(attention)
        self.heads, self.scale, self.split = attention.heads, attention.scale, split
        self.to_q, self.to_k = _as_conv(attention.to_q), _as_conv(attention.to_k)
        self.to_v, self.to_out = _as_conv(attention.to_v), _as_conv(attention.to_out[0])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B,C,1,S] and [B,D,1,L] to [B,C,1,S]."""
        # Scaled before the product, not after: the sums over d stay that much further from float16's maximum.
        q, k, v = (self._heads(part) for part in (self.to_q(x) * self.scale, self.to_k(c), self.to_v(c)))
        if self.split:
            heads = zip(*(part.split(1, dim=1) for part in (q, k, v)), strict=True)
            mixed = torch.cat([_attention(q=q, k=k, v=v) for q, k, v in heads], dim=1)
        else:
            mixed = _attention(q=q, k=k, v=v)
        return self.to_out(mixed.reshape(x.shape[0], -1, 1, x.shape[3]))

    def _heads(self, x: Tensor) -> Tensor:
        """[B,C,1,S] as [B,heads,d,S]."""
        return x.reshape(x.shape[0], self.heads, -1, x.shape[3])


def _attention(*, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B,heads,d,S] of queries to [B,heads,d,L] of keys and values."""
    return v @ (k.transpose(2, 3) @ q).softmax(dim=2)


def _as_conv(layer: nn.Module) -> nn.Conv2d:
    """The 1x1 convolution that equals a linear layer; a convolution is returned unchanged."""
    if isinstance(layer, nn.Conv2d):
        return layer
    assert isinstance(layer, nn.Linear)  # noqa: S101 - diffusers has no other kind here
    conv = nn.Conv2d(layer.in_features, layer.out_features, kernel_size=1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight[:, :, None, None], requires_grad=False)
    conv.bias = layer.bias
    return conv


def _check_attention(attention: Attention) -> None:
    optional = ("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")
    unknown = [name for name in optional if getattr(attention, name, None) is not None]
    if unknown or attention.residual_connection or attention.rescale_output_factor != 1.0:
        raise ValueError(
            f"an attention block has {unknown or 'a residual connection'}; only plain attention as in SD v1 "
            "and v2 is supported"
        )
