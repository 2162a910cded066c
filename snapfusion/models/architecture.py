"""A UNet's architecture as a value: which blocks stand where. SnapFusion Sec. 3.1, Table 3.

    conv_in ─ down_blocks.0 … down_blocks.n ─ mid_block ─ up_blocks.0 … up_blocks.n ─ conv_out

A stage is layers, and a layer at most one ResNet block and then any number of cross-attention blocks. A
block's name is its place in the model that it first stood in, as in diffusers: "up_blocks.1.attentions.0", of
which the stage keeps the last number. A copy beside it is "0+1". So weights are inherited by name, however
often a UNet has evolved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from snapfusion.settings import Settings

BlockKind = Literal["attention", "resnet"]
BlockKey = Annotated[str, Field(pattern=r"^[0-9]+(\+[0-9]+)?$")]


class ArchitectureError(ValueError):
    """An architecture that cannot be, or a change that it does not allow; the message names the place."""


class Layer(Settings):
    """A ResNet block and the cross-attention blocks after it, any of which may be missing.

    Attributes:
        resnet: the ResNet block's key in its stage; null for none.
        whole: false where the block was removed but channels change: its 1x1 shortcut is what remains.
        attentions: keys of the cross-attention blocks, in their order.
        skip: on the way down, whether the layer's output is handed to the way up; on the way up, whether one
            of these is taken in (the ResNet block, or its shortcut, sees both side by side).
    """

    resnet: BlockKey | None = None
    whole: bool = True
    attentions: tuple[BlockKey, ...] = ()
    skip: bool = False


StageLayers = tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block.

    Attributes:
        name: its path, such as "down_blocks.0.attentions.1".
        kind: "attention" or "resnet".
        stage: the part of the UNet it stands in, such as "down_blocks.0" or "mid_block".
        depth: how many times the latent was halved before it; the middle counts as the deepest.
    """

    name: str
    kind: BlockKind
    stage: str
    depth: int


class Architecture(Settings):
    """A UNet.

    Attributes:
        channels: of each level, the outermost first.
        heads: of attention, of each level.
        down: stages on the way down, the outermost first.
        middle: the stage between.
        up: stages on the way up, the deepest first.
        context: width of the encoded caption.
        groups: of the norms.
        sample_size: side of the latent.
        in_channels: of the latent.
        out_channels: of what is predicted.
        linear_projection: whether attention blocks begin and end with a linear layer, not a 1x1 convolution.
        upcast_attention: whether attention is computed in float32.
        guidance_embedding: numbers in which w is told (`snapfusion.models.guidance_embedding`); null for none.
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
    def _fits_together(self) -> Self:
        levels = len(self.channels)
        if not len(self.heads) == len(self.down) == len(self.up) == levels:
            raise ValueError(
                f"{levels} levels of channels, {len(self.heads)} of heads, {len(self.down)} stages down and "
                f"{len(self.up)} up: all must be as many"
            )
        for level in range(levels):
            given = 1 + sum(layer.skip for layer in self.down[level])
            taken = sum(layer.skip for layer in self.up[levels - 1 - level])
            if given != taken:
                raise ValueError(
                    f"down_blocks.{level} hands {given} tensors to up_blocks.{levels - 1 - level}, its input "
                    f"being one; {taken} are taken there"
                )
        for stage in self.stages:
            self._check_stage(stage)
        return self

    def _check_stage(self, stage: str) -> None:
        layers = self.stages[stage]
        for kind, keys in (
            ("resnets", [layer.resnet for layer in layers if layer.resnet is not None]),
            ("attentions", [key for layer in layers for key in layer.attentions]),
        ):
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                raise ValueError(f"{stage}.{kind}.{twice[0]} stands in two places")
        for layer, (given, wanted) in zip(layers, self.widths(stage), strict=True):
            if layer.resnet is None and given != wanted:
                raise ValueError(
                    f"{stage}: a layer without a ResNet block has {given} channels, not {wanted}"
                )
            if layer.resnet is not None and not layer.whole and given == wanted:
                raise ValueError(f"{stage}.resnets.{layer.resnet}: no shortcut remains where channels stay")

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
                    yield Block(
                        name=f"{stage}.resnets.{layer.resnet}", kind="resnet", stage=stage, depth=depth
                    )
                for key in layer.attentions:
                    yield Block(name=f"{stage}.attentions.{key}", kind="attention", stage=stage, depth=depth)

    def level(self, stage: str) -> int:
        """How many times the latent was halved before the stage."""
        side, _, number = stage.partition(".")
        deepest = len(self.channels) - 1
        if side == "mid_block":
            return deepest
        return int(number) if side == "down_blocks" else deepest - int(number)

    def widths(self, stage: str) -> list[tuple[int, int]]:
        """Channels before and after each layer's ResNet block; before, with those of a tensor taken in."""
        level = self.level(stage)
        wanted = self.channels[level]
        outer = self.channels[max(level - 1, 0)]
        if stage.startswith("down"):
            given = outer
        else:
            given = (
                self.channels[min(level + 1, len(self.channels) - 1)] if stage.startswith("up") else wanted
            )
        # Taken in the reverse order of handing over: the stage's own layers first, its input last.
        taken = [wanted] * (sum(layer.skip for layer in self.stages[stage]) - 1) + [outer]
        widths = []
        for layer in self.stages[stage]:
            extra = taken.pop(0) if stage.startswith("up") and layer.skip else 0
            widths.append((given + extra, wanted))
            given = wanted
        return widths

    def without(self, name: str) -> Self:
        """The architecture with the block of that name removed. SnapFusion Alg. 1, A^-.

        What remains is what `snapfusion.models.blocks.skipping_blocks` computes: nothing, or the shortcut of a ResNet
        block that changes the number of channels.

        Raises:
            ArchitectureError: if there is no such block.
        """
        block = self._block(name)
        key = name.rpartition(".")[2]
        changing = {
            layer.resnet: given != wanted
            for layer, (given, wanted) in zip(self.stages[block.stage], self.widths(block.stage), strict=True)
        }

        def change(layer: Layer) -> list[Layer]:
            if block.kind == "attention":
                left = tuple(other for other in layer.attentions if other != key)
                return [layer.model_copy(update={"attentions": left})]
            if layer.resnet != key:
                return [layer]
            return [layer.model_copy(update={"whole": False} if changing[key] else {"resnet": None})]

        return self._with_stage(block.stage, change)

    def with_copy(self, name: str) -> Self:
        """The architecture with a copy of the block beside it. SnapFusion Alg. 1, A^+.

        Raises:
            ArchitectureError: if there is no such block, or it changes the number of channels, so that its
                weights fit nowhere beside it.
        """
        block = self._block(name)
        key = name.rpartition(".")[2]
        if not self.can_copy(name):
            raise ArchitectureError(f"{name} changes the number of channels: a copy fits nowhere beside it")
        copy = _next_copy(key, taken=self._keys(block))

        def change(layer: Layer) -> list[Layer]:
            if block.kind == "attention":
                keys = [(other, copy) if other == key else (other,) for other in layer.attentions]
                return [layer.model_copy(update={"attentions": tuple(key for pair in keys for key in pair)})]
            if layer.resnet != key:
                return [layer]
            # On the way down a layer hands over what it ends with.
            down = block.stage.startswith("down")
            first = Layer(resnet=key, skip=layer.skip and not down)
            second = Layer(resnet=copy, attentions=layer.attentions, skip=layer.skip and down)
            return [first, second]

        return self._with_stage(block.stage, change)

    def can_copy(self, name: str) -> bool:
        """Whether a copy of the block fits beside it: it has as many channels before as after."""
        block = self._block(name)
        if block.kind == "attention":
            return True
        key = name.rpartition(".")[2]
        widths = dict(
            zip((layer.resnet for layer in self.stages[block.stage]), self.widths(block.stage), strict=True)
        )
        given, wanted = widths[key]
        return given == wanted

    def counts(self) -> dict[tuple[str, BlockKind], int]:
        """Blocks of each stage and kind."""
        found: dict[tuple[str, BlockKind], int] = {
            (stage, kind): 0 for stage in self.stages for kind in ("attention", "resnet")
        }
        for block in self.blocks:
            found[block.stage, block.kind] += 1
        return found

    def _block(self, name: str) -> Block:
        found = next((block for block in self.blocks if block.name == name), None)
        if found is None:
            names = ", ".join(block.name for block in self.blocks)
            raise ArchitectureError(f"the architecture has no block {name!r}; its blocks are {names}")
        return found

    def _keys(self, block: Block) -> set[str]:
        layers = self.stages[block.stage]
        if block.kind == "attention":
            return {key for layer in layers for key in layer.attentions}
        return {layer.resnet for layer in layers if layer.resnet is not None}

    def _with_stage(self, name: str, change: Callable[[Layer], list[Layer]]) -> Self:
        layers = tuple(layer for old in self.stages[name] for layer in change(old))
        side, _, number = name.partition(".")
        if side == "mid_block":
            return self.changed(middle=layers)
        field = "down" if side == "down_blocks" else "up"
        stages: tuple[StageLayers, ...] = getattr(self, field)
        place = int(number)
        return self.changed(**{field: (*stages[:place], layers, *stages[place + 1 :])})

    def changed(self, **fields: Any) -> Self:  # noqa: ANN401 - of the fields' own types
        """The architecture with other values, which are checked as all are."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**values, **fields})


def origin_of(key: str) -> str:
    """The key of the block that a copy was made of; a block that is no copy is its own origin."""
    return key.partition("+")[0]


def efficient_architecture(origin: Architecture) -> Architecture:
    """SnapFusion Table 3, column "Ours" made of column "Origin", read literally; the same for smaller twins.

    No cross-attention on the outermost level. On the deepest that has any, one ResNet block fewer each way,
    and twice the cross-attention on the way up. Below it and in the middle, 4 ResNet blocks of 7. A ResNet
    block of the way down goes with the one that takes its output on the way up; the rest keep their weights.

    Raises:
        ArchitectureError: if there are fewer than three levels: these rows of the table would be one.
    """
    deepest = len(origin.channels) - 1
    if deepest < 2:
        raise ArchitectureError(f"Table 3 has at least three levels of channels; this UNet has {deepest + 1}")
    down, up = list(origin.down), list(origin.up)
    down[0] = _without_attention(down[0])
    up[deepest] = _without_attention(up[deepest])
    attentive = deepest - 1
    down[attentive] = _in_one_layer(down[attentive])
    up[1] = _in_fewer_layers(up[1])
    down[deepest] = down[deepest][:1]
    up[0] = up[0][1:]
    middle = (origin.middle[0],)
    return origin.changed(down=tuple(down), middle=middle, up=tuple(up))


def _without_attention(stage: StageLayers) -> StageLayers:
    return tuple(layer.model_copy(update={"attentions": ()}) for layer in stage)


def _in_one_layer(stage: StageLayers) -> StageLayers:
    """The first ResNet block, and all cross-attention after it."""
    keys = tuple(key for layer in stage for key in layer.attentions)
    return (stage[0].model_copy(update={"attentions": keys}),)


def _in_fewer_layers(stage: StageLayers) -> StageLayers:
    """Without the first ResNet block, and each cross-attention beside a copy, in equal parts."""
    keys = [key for layer in stage for key in layer.attentions]
    doubled = [key for old in keys for key in (old, _next_copy(old, taken=set(keys)))]
    layers = stage[1:]
    share = len(doubled) // len(layers)
    return tuple(
        layer.model_copy(update={"attentions": tuple(doubled[number * share : (number + 1) * share])})
        for number, layer in enumerate(layers)
    )


def _next_copy(key: str, *, taken: set[str]) -> str:
    number = 1
    while f"{origin_of(key)}+{number}" in taken:
        number += 1
    return f"{origin_of(key)}+{number}"
