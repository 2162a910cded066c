"""A UNet that is told the guidance scale and answers in one pass (Meng et al. 2023): the "w-condition".

SnapFusion Sec. 4.2 compares with it (Fig. 6b). Diffusers' own class can hold it, and its stock pipeline
samples it: the scale goes in beside the timestep, as sines and cosines of 1000 (w - 1).
"""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snapfusion.models.unet import BlockUNet, architecture_of, build_unet

EMBEDDING_SIZE = 256
"""Numbers that the scale is told in."""

WEIGHT_NAME = "time_embedding.cond_proj.weight"
"""The tensor that such a UNet has and others have not."""


def has_guidance_embedding(unet: UNet2DConditionModel | BlockUNet) -> bool:
    """Whether `unet` takes the guidance scale as an input."""
    return unet.config["time_cond_proj_dim"] is not None


def with_guidance_embedding(unet: UNet2DConditionModel | BlockUNet) -> UNet2DConditionModel | BlockUNet:
    """`unet` with an input for the scale, which it does not heed yet; as it is if it has one.

    The new one is on the same device, in the same dtype, and leaves the old one as it was.
    """
    if has_guidance_embedding(unet):
        return unet
    made = build_unet(architecture_of(unet).changed(guidance_embedding=EMBEDDING_SIZE))
    nn.Module.to(made, device=unet.device, dtype=unet.dtype)
    nn.init.zeros_(made.time_embedding.cond_proj.weight)
    made.load_state_dict(unet.state_dict(), strict=False)
    return made.eval().requires_grad_(requires_grad=False)


def guidance_embedding(w: Tensor, *, size: int = EMBEDDING_SIZE) -> Tensor:
    """What the UNet is told of w, float32 [B]: float32 [B,size]; `size` is even."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = ((w - 1.0) * 1000.0).view(-1, 1) * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)
