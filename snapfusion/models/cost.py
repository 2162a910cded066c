"""Parameters and multiply-accumulates of a UNet, block by block. SnapFusion Fig. 2, Table 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snapfusion.models.architecture import Architecture, BlockKind
from snapfusion.models.unet import BlockUNet

NUM_TOKENS = 77
"""Of an encoded caption, in CLIP."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of a UNet takes.

    Attributes:
        parameters: numbers that are learned.
        macs: multiply-accumulates of a pass for one latent, in convolutions, linear layers and attention.
    """

    parameters: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(parameters=self.parameters + other.parameters, macs=self.macs + other.macs)


ZERO_COST = Cost(parameters=0, macs=0)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a UNet.

    Attributes:
        blocks: by the names of its blocks.
        rest: by stage, what is no block of Table 3: samplers and shortcuts that remain; "ends" is the first
            and last convolution and what embeds the timestep.
    """

    blocks: dict[str, Cost]
    rest: dict[str, Cost]

    @property
    def whole(self) -> Cost:
        """Of all of it."""
        return sum((*self.blocks.values(), *self.rest.values()), ZERO_COST)

    def of_stage(self, stage: str) -> Cost:
        """Of a stage: its blocks, and the rest of it."""
        mine = (cost for name, cost in self.blocks.items() if name.startswith(f"{stage}."))
        return sum(mine, self.rest.get(stage, ZERO_COST))


ENDS = "ends"


def costs_of(architecture: Architecture, *, tokens: int = NUM_TOKENS) -> Costs:
    """Counted on the true shapes, without any weights being made.

    Args:
        architecture: of the UNet.
        tokens: of the encoded caption.
    """
    with torch.device("meta"):
        unet = BlockUNet.of(architecture)
        side = architecture.sample_size
        told = architecture.guidance_embedding
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(
                torch.empty(1, architecture.in_channels, side, side),
                torch.zeros(1),
                torch.empty(1, tokens, architecture.context),
                timestep_cond=None if told is None else torch.empty(1, told),
            )
    # Keys are "BlockUNet.down_blocks.0…"; "Global" is the whole.
    flops = {
        path.partition(".")[2]: sum(counted.values()) for path, counted in counter.get_flop_counts().items()
    }
    macs = {path: count // 2 for path, count in flops.items()}
    blocks = {
        block.name: Cost(parameters=_parameters(unet.get_submodule(block.name)), macs=macs.get(block.name, 0))
        for block in architecture.blocks
    }
    stages = {
        stage: Cost(parameters=_parameters(unet.get_submodule(stage)), macs=macs.get(stage, 0))
        for stage in architecture.stages
    }
    whole = Cost(parameters=_parameters(unet), macs=sum(counter.get_flop_counts()["Global"].values()) // 2)
    rest = {
        stage: _minus(cost, [blocks[block.name] for block in architecture.blocks if block.stage == stage])
        for stage, cost in stages.items()
    }
    return Costs(blocks=blocks, rest={**rest, ENDS: _minus(whole, list(stages.values()))})


def _minus(cost: Cost, parts: list[Cost]) -> Cost:
    taken = sum(parts, ZERO_COST)
    return Cost(parameters=cost.parameters - taken.parameters, macs=cost.macs - taken.macs)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, kw_only=True)
class BlockCountRow:
    """A row of Table 3."""

    stage: str
    resolution: int
    kind: str
    dimension: int
    blocks: int


_KINDS: dict[BlockKind, str] = {"attention": "Cross Attention", "resnet": "ResNet"}


def block_count_rows(architecture: Architecture) -> Iterator[BlockCountRow]:
    """The rows of SnapFusion Table 3, whose "Mid" is all that is at the deepest resolution."""
    counts = architecture.counts()
    for name, stages in paper_stages(architecture).items():
        level = architecture.level(stages[0])
        for kind, words in _KINDS.items():
            yield BlockCountRow(
                stage=name,
                resolution=architecture.sample_size >> level,
                kind=words,
                dimension=architecture.channels[level],
                blocks=sum(counts[stage, kind] for stage in stages),
            )


def paper_stages(architecture: Architecture) -> dict[str, list[str]]:
    """The stages behind each stage of SnapFusion Table 3 and Fig. 2: "Down-1", ..., "Mid", ..., "Up-3"."""
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


def block_count_table(*architectures: Architecture) -> list[tuple[Any, ...]]:
    """SnapFusion Table 3: stage, resolution, kind, dimension, each UNet's blocks; all have as many stages."""
    tables = [list(block_count_rows(architecture)) for architecture in architectures]
    return [
        (row[0].stage, row[0].resolution, row[0].kind, row[0].dimension, *(one.blocks for one in row))
        for row in zip(*tables, strict=True)
    ]
