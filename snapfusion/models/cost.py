"""Parameters and multiply-accumulates of a UNet, block by block. SnapFusion Fig. 2, Table 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snapfusion.models.architecture import Architecture, BlockKind
from snapfusion.models.unet import block_unet

NUM_TOKENS = 77
"""Tokens of an encoded caption, in CLIP."""
ENDS = "ends"
"""The first and last convolution and the timestep embedding, as a stage."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a part of a UNet.

    Attributes:
        parameters: number of learned parameters.
        macs: multiply-accumulates of a pass for one latent, in convolutions, linear layers and attention.
    """

    parameters: int
    macs: int

    @property
    def gmacs(self) -> float:
        """10^9 multiply-accumulates."""
        return self.macs / 1e9

    def __add__(self, other: Cost) -> Cost:
        return Cost(parameters=self.parameters + other.parameters, macs=self.macs + other.macs)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(parameters=self.parameters - other.parameters, macs=self.macs - other.macs)


ZERO_COST = Cost(parameters=0, macs=0)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of a UNet.

    Attributes:
        blocks: by block name.
        rest: by stage, or `ENDS`: everything that is no block of Table 3, such as samplers and shortcuts.
    """

    blocks: dict[str, Cost]
    rest: dict[str, Cost]

    @property
    def total(self) -> Cost:
        """Cost of the whole UNet."""
        return sum((*self.blocks.values(), *self.rest.values()), ZERO_COST)

    def of_stage(self, stage: str) -> Cost:
        """Return the cost of a stage, or of `ENDS`."""
        blocks = (cost for name, cost in self.blocks.items() if name.startswith(f"{stage}."))
        return sum(blocks, self.rest.get(stage, ZERO_COST))


def costs_of(architecture: Architecture, *, tokens: int = NUM_TOKENS) -> Costs:
    """Count the costs of a UNet with the true tensor shapes, on torch's meta device.

    Args:
        architecture: of the UNet.
        tokens: of the encoded caption.
    """
    with torch.device("meta"):
        unet = block_unet(architecture)
        side, embedding = architecture.sample_size, architecture.guidance_embedding
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(
                torch.empty(1, architecture.in_channels, side, side),
                torch.zeros(1),
                torch.empty(1, tokens, architecture.context),
                timestep_cond=None if embedding is None else torch.empty(1, embedding),
            )
    # Keys are module paths such as "BlockUNet.down_blocks.0"; "Global" is the whole network.
    flops = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    flops[""] = sum(counter.get_flop_counts()["Global"].values())

    def cost(path: str) -> Cost:
        # torch counts a multiply-accumulate as two operations.
        return Cost(parameters=count_parameters(unet.get_submodule(path)), macs=flops.get(path, 0) // 2)

    blocks = {block.name: cost(block.name) for block in architecture.blocks}
    stages = {stage: cost(stage) for stage in architecture.stages}
    rest = dict(stages)
    for block in architecture.blocks:
        rest[block.stage] -= blocks[block.name]
    rest[ENDS] = cost("") - sum(stages.values(), ZERO_COST)
    return Costs(blocks=blocks, rest=rest)


def count_parameters(module: nn.Module) -> int:
    """Count the learned parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


_KINDS: dict[BlockKind, str] = {"attention": "Cross Attention", "resnet": "ResNet"}


def block_count_table(*architectures: Architecture) -> list[tuple[Any, ...]]:
    """SnapFusion Table 3: (stage, resolution, kind, dimension, blocks of each UNet).

    "Mid" is all that is at the deepest resolution. All UNets have the levels of the first.
    """
    first, counts = architectures[0], [architecture.counts() for architecture in architectures]
    rows: list[tuple[Any, ...]] = []
    for name, stages in paper_stages(first).items():
        level = first.level(stages[0])
        for kind, label in _KINDS.items():
            numbers = [sum(count[stage, kind] for stage in stages) for count in counts]
            rows.append((name, first.sample_size >> level, label, first.channels[level], *numbers))
    return rows


def paper_stages(architecture: Architecture) -> dict[str, list[str]]:
    """Group the stages as SnapFusion Table 3 and Fig. 2 do: "Down-1", .., "Mid", .., "Up-3"."""
    deepest = len(architecture.channels) - 1
    groups: dict[str, list[str]] = {}
    for stage in architecture.stages:
        groups.setdefault(_paper_name(stage, deepest=deepest), []).append(stage)
    return groups


def _paper_name(stage: str, *, deepest: int) -> str:
    side, _, number = stage.partition(".")
    if side == "down_blocks" and int(number) < deepest:
        return f"Down-{int(number) + 1}"
    if side == "up_blocks" and int(number) > 0:
        return f"Up-{number}"
    return "Mid"
