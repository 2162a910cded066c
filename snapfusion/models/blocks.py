"""A UNet's blocks by name, and the UNet without some of them.

SnapFusion's unit of architecture (Sec. 3.1, Table 3) is the block: a ResNet block, or a cross-attention
block, which is one `Transformer2DModel` of self-attention, cross-attention and feed-forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from snapfusion.models.architecture import Block
from snapfusion.models.unet import BlockUNet, architecture_of


def blocks_of(unet: UNet2DConditionModel | BlockUNet) -> tuple[Block, ...]:
    """The blocks of `unet`, in the order of computation."""
    return architecture_of(unet).blocks


@contextmanager
def skipping_blocks(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> Iterator[None]:
    """Within it, the named blocks of `unet` hand on what they are given; their work is not computed.

    A ResNet block that changes the number of channels keeps its 1x1 shortcut, which is what is left of it
    when its residual is zero. Not for two threads at once: the blocks are changed in place, then restored.

    Raises:
        ValueError: if `unet` has no block of one of the names.
    """
    modules = _modules(unet, names)
    for module in modules:
        module.forward = _pass_through(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own shows again


def set_skipped_blocks(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> None:
    """As `skipping_blocks`, of all blocks exactly those named, until it is called again; with none, `unet` is whole.

    Raises:
        ValueError: if `unet` has no block of one of the names.
    """
    chosen = _modules(unet, names)
    for block in blocks_of(unet):
        vars(unet.get_submodule(block.name)).pop("forward", None)
    for module in chosen:
        module.forward = _pass_through(module)


def _modules(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> list[nn.Module]:
    known = {block.name for block in blocks_of(unet)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"the UNet has no block {unknown[0]!r}; its blocks are {', '.join(sorted(known))}")
    return [unet.get_submodule(name) for name in names]


def _pass_through(module: nn.Module) -> Any:  # noqa: ANN401 - it stands for the forward of either class
    if isinstance(module, ResnetBlock2D):
        shortcut = module.conv_shortcut
        scale = module.output_scale_factor

        def resnet(hidden: Tensor, *_: object, **__: object) -> Tensor:
            return (hidden if shortcut is None else shortcut(hidden)) / scale

        return resnet

    def attention(hidden: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (hidden,)

    return attention
