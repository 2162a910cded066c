"""A UNet's blocks by name, and evaluation of the UNet without some of them.

SnapFusion's unit of architecture (Sec. 3.1, Table 3) is the block: a ResNet block, or a cross-attention
block, which is one `Transformer2DModel` of self-attention, cross-attention and feed-forward.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from snapfusion.models.architecture import Block
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import architecture_of


def blocks_of(unet: UNet2DConditionModel | BlockUNet) -> tuple[Block, ...]:
    """Return the blocks of `unet` in the order of computation."""
    return architecture_of(unet).blocks


@contextmanager
def skipping_blocks(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> Iterator[None]:
    """Skip the named blocks of `unet` within the context: their input is passed through.

    A ResNet block that changes the number of channels keeps its 1x1 shortcut. Not thread-safe: the blocks are
    changed in place, then restored.

    Raises:
        ValueError: if `unet` has no block of one of the names.
    """
    modules = _modules(unet, names)
    for module in modules:
        # An attribute of the instance hides the method of the class; hooks and state dict are unaffected.
        module.forward = _pass_through(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # uncovers the method of the class


def set_skipped_blocks(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> None:
    """Skip exactly the named blocks of `unet`, as `skipping_blocks` does, until the next call.

    Raises:
        ValueError: if `unet` has no block of one of the names.
    """
    modules = _modules(unet, names)
    for block in blocks_of(unet):
        vars(unet.get_submodule(block.name)).pop("forward", None)
    for module in modules:
        module.forward = _pass_through(module)


def _modules(unet: UNet2DConditionModel | BlockUNet, names: Collection[str]) -> list[nn.Module]:
    known = {block.name for block in blocks_of(unet)}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"the UNet has no block {unknown[0]!r}; its blocks are {', '.join(sorted(known))}")
    return [unet.get_submodule(name) for name in names]


def _pass_through(module: nn.Module) -> Any:  # noqa: ANN401 - it replaces the forward of either class
    if isinstance(module, ResnetBlock2D):
        shortcut = module.conv_shortcut
        scale = module.output_scale_factor

        def resnet(hidden: Tensor, *_: object, **__: object) -> Tensor:
            return (hidden if shortcut is None else shortcut(hidden)) / scale

        return resnet

    def attention(hidden: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (hidden,)

    return attention
