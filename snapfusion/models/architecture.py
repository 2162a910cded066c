"""A UNet's architecture as a value: the blocks of each stage. SnapFusion Sec. 3.1, Table 3.

    conv_in ─ down_blocks.0 … down_blocks.n ─ mid_block ─ up_blocks.0 … up_blocks.n ─ conv_out

A stage is a sequence of layers; a layer is at most one ResNet block, then any number of cross-attention
blocks. A block keeps its diffusers name in the original model, such as "up_blocks.1.attentions.0", of which
the stage stores the key "0"; a copy of it has the key "0+1". So weights are inherited by name through any
number of changes.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from snapfusion.models.snapfusion_unet_v1 import layer_channels, stage_level
from snapfusion.settings import Settings

BlockKind = Literal["attention", "resnet"]
BlockKey = Annotated[str, Field(pattern=r"^[0-9]+(\+[0-9]+)?$")]


class ArchitectureError(ValueError):
    """A change that an architecture does not allow."""


class Layer(Settings):
    """An optional ResNet block and the cross-attention blocks after it.

    Attributes:
        resnet: key of the ResNet block; null for none.
        whole: false if the block was removed but changes channels, so that its 1x1 shortcut remains.
        attentions: keys of the cross-attention blocks, in order.
        skip: of a down stage: whether the output of the layer is a skip connection; of an up stage: whether
            the layer concatenates one to its input.
    """

    resnet: BlockKey | None = None
    whole: bool = True
    attentions: tuple[BlockKey, ...] = ()
    skip: bool = False


StageLayers = tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block.

    Attributes:
        name: its path, such as "down_blocks.0.attentions.1".
        kind: "attention" or "resnet".
        stage: of the UNet, such as "down_blocks.0" or "mid_block".
        depth: number of halvings of the latent before it; the middle has that of the deepest level.
    """

    name: str
    kind: BlockKind
    stage: str
    depth: int

    @property
    def key(self) -> str:
        """Its key in the stage."""
        return self.name.rpartition(".")[2]


class Architecture(Settings):
    """The architecture of a UNet.

    Attributes:
        channels: of each level, the outermost first.
        heads: attention heads of each level.
        down: down stages, the outermost first.
        middle: the middle stage.
        up: up stages, the deepest first.
        context: width of the encoded caption.
        groups: of the norms.
        sample_size: side of the latent.
        in_channels: of the latent.
        out_channels: of the prediction.
        linear_projection: whether attention blocks begin and end with a linear layer, not a 1x1 convolution.
        upcast_attention: whether attention is computed in float32.
        guidance_embedding: size of the guidance embedding of a w-conditioned UNet; null for none.
    """

    channels: tuple[PositiveInt, ...]
    heads: tuple[PositiveInt, ...]
    down: tuple[StageLayers, ...]
    middle: StageLayers
    up: tuple[StageLayers, ...]
    context: PositiveInt
    groups: PositiveInt = 32
    sample_size: PositiveInt
    in_channels: PositiveInt = 4
    out_channels: PositiveInt = 4
    linear_projection: bool = False
    upcast_attention: bool = False
    guidance_embedding: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        levels = len(self.channels)
        if not len(self.heads) == len(self.down) == len(self.up) == levels:
            raise ValueError(
                f"{levels} levels of channels, {len(self.heads)} of heads, {len(self.down)} stages down and "
                f"{len(self.up)} up: the numbers must be equal"
            )
        for level in range(levels):
            up = levels - 1 - level
            given = 1 + sum(layer.skip for layer in self.down[level])
            used = sum(layer.skip for layer in self.up[up])
            if given != used:
                outputs = f"{given} skip connections, its input included"
                raise ValueError(f"down_blocks.{level} has {outputs}; up_blocks.{up} uses {used}")
        for stage in self.stages:
            self._check_stage(stage)
        return self

    def _check_stage(self, stage: str) -> None:
        layers = self.stages[stage]
        for kind, keys in (
            ("resnets", [layer.resnet for layer in layers if layer.resnet is not None]),
            ("attentions", [key for layer in layers for key in layer.attentions]),
        ):
            if repeated := [key for key, count in Counter(keys).items() if count > 1]:
                raise ValueError(f"{stage}.{kind}.{repeated[0]} is in the stage more than once")
        for layer, given, expected in self.layer_channels(stage):
            if layer.resnet is None and given != expected:
                raise ValueError(f"{stage}: a layer without a ResNet has {given} channels, not {expected}")
            if layer.resnet is not None and not layer.whole and given == expected:
                raise ValueError(f"{stage}.resnets.{layer.resnet} keeps its channels: no shortcut remains")

    @property
    def stages(self) -> dict[str, StageLayers]:
        """All stages by name, in the order of computation."""
        return {
            **{f"down_blocks.{level}": stage for level, stage in enumerate(self.down)},
            "mid_block": self.middle,
            **{f"up_blocks.{number}": stage for number, stage in enumerate(self.up)},
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in the order of computation."""
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        for stage, layers in self.stages.items():
            depth = self.level(stage)
            for layer in layers:
                if layer.resnet is not None and layer.whole:
                    name = f"{stage}.resnets.{layer.resnet}"
                    yield Block(name=name, kind="resnet", stage=stage, depth=depth)
                for key in layer.attentions:
                    yield Block(name=f"{stage}.attentions.{key}", kind="attention", stage=stage, depth=depth)

    def level(self, stage: str) -> int:
        """Return the number of halvings of the latent before the stage."""
        return stage_level(stage, levels=len(self.channels))

    def layer_channels(self, stage: str) -> list[tuple[Layer, int, int]]:
        """Return each layer of a stage with its channels before and after the ResNet block.

        Those before include the channels of a concatenated skip connection.
        """
        layers = self.stages[stage]
        skips = [layer.skip for layer in layers]
        pairs = layer_channels(stage, channels=self.channels, skips=skips)
        return [(layer, *pair) for layer, pair in zip(layers, pairs, strict=True)]

    def without(self, name: str) -> Self:
        """Remove a block. SnapFusion Alg. 1, A^-.

        The result computes what `snapfusion.models.blocks.skipping_blocks` does: a ResNet block that changes
        the number of channels leaves its shortcut.

        Raises:
            ArchitectureError: if there is no such block.
        """
        block = self._block(name)
        removed: dict[str, Any] = {"whole": False} if self._changes_channels(block) else {"resnet": None}

        def change(layer: Layer) -> list[Layer]:
            if block.kind == "attention":
                rest = tuple(key for key in layer.attentions if key != block.key)
                return [layer.model_copy(update={"attentions": rest})]
            return [layer.model_copy(update=removed) if layer.resnet == block.key else layer]

        return self._with_stage(block.stage, change)

    def with_copy(self, name: str) -> Self:
        """Insert a copy of a block after it. SnapFusion Alg. 1, A^+.

        Raises:
            ArchitectureError: if there is no such block, or it changes the number of channels, so that its
                weights do not fit after it.
        """
        block = self._block(name)
        if self._changes_channels(block):
            raise ArchitectureError(f"{name} changes the number of channels: a copy does not fit after it")
        alike = [other for other in self.blocks if (other.stage, other.kind) == (block.stage, block.kind)]
        copy = _next_copy(block.key, existing={other.key for other in alike})

        def change(layer: Layer) -> list[Layer]:
            if block.kind == "attention":
                keys = [(key, copy) if key == block.key else (key,) for key in layer.attentions]
                return [layer.model_copy(update={"attentions": tuple(itertools.chain(*keys))})]
            if layer.resnet != block.key:
                return [layer]
            # The skip connection is the output of a down layer, but part of the input of an up layer.
            down = block.stage.startswith("down")
            return [
                Layer(resnet=block.key, skip=layer.skip and not down),
                Layer(resnet=copy, attentions=layer.attentions, skip=layer.skip and down),
            ]

        return self._with_stage(block.stage, change)

    def can_copy(self, name: str) -> bool:
        """Whether a copy of the block fits after it, because it keeps the number of channels."""
        return not self._changes_channels(self._block(name))

    def counts(self) -> dict[tuple[str, BlockKind], int]:
        """Count the blocks of each stage and kind."""
        found = Counter((block.stage, block.kind) for block in self.blocks)
        return {(stage, kind): found[stage, kind] for stage in self.stages for kind in get_args(BlockKind)}

    def changed(self, **fields: Any) -> Self:  # noqa: ANN401 - of the fields' own types
        """Return a validated copy with other values."""
        return type(self)(**{**dict(self), **fields})

    def _block(self, name: str) -> Block:
        blocks = {block.name: block for block in self.blocks}
        if name not in blocks:
            names = ", ".join(blocks)
            raise ArchitectureError(f"the architecture has no block {name!r}; its blocks are {names}")
        return blocks[name]

    def _changes_channels(self, block: Block) -> bool:
        return block.kind == "resnet" and any(
            layer.resnet == block.key and in_channels != out_channels
            for layer, in_channels, out_channels in self.layer_channels(block.stage)
        )

    def _with_stage(self, name: str, change: Callable[[Layer], list[Layer]]) -> Self:
        layers = tuple(layer for old in self.stages[name] for layer in change(old))
        side, _, number = name.partition(".")
        if side == "mid_block":
            return self.changed(middle=layers)
        field = "down" if side == "down_blocks" else "up"
        stages = list(getattr(self, field))
        stages[int(number)] = layers
        return self.changed(**{field: tuple(stages)})


def origin_of(key: str) -> str:
    """Return the key of the block that a copy was made of; any other key is returned unchanged."""
    return key.partition("+")[0]


def efficient_architecture(origin: Architecture) -> Architecture:
    """Change `origin` as SnapFusion Table 3 changes column "Origin" to column "Ours", read literally.

    The outermost level has no cross-attention. The deepest level with cross-attention has one ResNet block
    fewer in each direction, and twice the cross-attention in its up stage. The levels below it have 4 ResNet
    blocks of 7. A removed ResNet block of a down stage is removed with the one that uses its output in the up
    stage; the others keep their weights.

    Raises:
        ArchitectureError: for fewer than three levels, which the table does not apply to.
    """
    deepest = len(origin.channels) - 1
    if deepest < 2:
        raise ArchitectureError(f"Table 3 has at least three levels of channels; this UNet has {deepest + 1}")
    down, up = list(origin.down), list(origin.up)
    down[0] = _without_attention(down[0])
    up[deepest] = _without_attention(up[deepest])
    down[deepest - 1] = _in_one_layer(down[deepest - 1])
    up[1] = _in_fewer_layers(up[1])
    down[deepest] = down[deepest][:1]
    up[0] = up[0][1:]
    return origin.changed(down=tuple(down), middle=origin.middle[:1], up=tuple(up))


def _without_attention(stage: StageLayers) -> StageLayers:
    return tuple(layer.model_copy(update={"attentions": ()}) for layer in stage)


def _in_one_layer(stage: StageLayers) -> StageLayers:
    """Keep the first ResNet block, with all cross-attention after it."""
    keys = tuple(key for layer in stage for key in layer.attentions)
    return (stage[0].model_copy(update={"attentions": keys}),)


def _in_fewer_layers(stage: StageLayers) -> StageLayers:
    """Drop the first ResNet block; copy each cross-attention, and spread them equally over the layers."""
    keys = [key for layer in stage for key in layer.attentions]
    doubled = [key for old in keys for key in (old, _next_copy(old, existing=set(keys)))]
    layers = stage[1:]
    share = len(doubled) // len(layers)
    return tuple(
        layer.model_copy(update={"attentions": tuple(doubled[number * share : (number + 1) * share])})
        for number, layer in enumerate(layers)
    )


def _next_copy(key: str, *, existing: set[str]) -> str:
    copies = (f"{origin_of(key)}+{number}" for number in itertools.count(1))
    return next(copy for copy in copies if copy not in existing)
