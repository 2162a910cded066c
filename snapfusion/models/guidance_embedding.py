"""Guidance embedding of a w-conditioned UNet, which takes the guidance scale as an input.

It needs one pass instead of two (Meng et al. 2023); SnapFusion Sec. 4.2 compares with it (Fig. 6b). The
format is diffusers' (`time_cond_proj_dim`), whose stock pipeline can sample such a UNet: sines and cosines of
1000 (w - 1) are projected and added to the timestep embedding.
"""

import math

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import architecture_of, build_unet

EMBEDDING_SIZE = 256

WEIGHT_NAME = "time_embedding.cond_proj.weight"
"""The tensor that only a w-conditioned UNet has."""


def has_guidance_embedding(unet: UNet2DConditionModel | BlockUNet) -> bool:
    """Whether `unet` takes the guidance scale as an input."""
    return unet.config["time_cond_proj_dim"] is not None


def with_guidance_embedding(unet: UNet2DConditionModel | BlockUNet) -> UNet2DConditionModel | BlockUNet:
    """Return a copy of `unet` with a guidance input, or `unet` itself if it has one.

    The new weights are zero, so the output does not depend on w yet. Device and dtype are those of `unet`.
    """
    if has_guidance_embedding(unet):
        return unet
    conditioned = build_unet(architecture_of(unet).changed(guidance_embedding=EMBEDDING_SIZE))
    nn.Module.to(conditioned, device=unet.device, dtype=unet.dtype)
    nn.init.zeros_(conditioned.time_embedding.cond_proj.weight)
    conditioned.load_state_dict(unet.state_dict(), strict=False)
    return conditioned.eval().requires_grad_(requires_grad=False)


def guidance_embedding(w: Tensor, *, size: int = EMBEDDING_SIZE) -> Tensor:
    """Embed w, float32 [B], as float32 [B,size]; `size` is even."""
    # diffusers embeds w - 1, so that no guidance is zero, with these frequencies.
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = ((w - 1.0) * 1000.0).view(-1, 1) * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)
