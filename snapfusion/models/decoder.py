"""The efficient image decoder: Stable Diffusion's own decoder at half its width. SnapFusion Sec. 3.2 and B.2.

A folder holds one: config.json, which carries the weights' SHA-256, and decoder.safetensors. In the folder's
terms a latent is scaled, as everywhere in this project: posterior mean times the VAE's scaling factor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Self

import fsspec
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from pydantic import PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from snapfusion.models.settings import Initialization
from snapfusion.settings import Settings, SettingsError

CONFIG = "config.json"
WEIGHTS = "decoder.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class DecoderError(ValueError):
    """A decoder folder that cannot be trusted or used; the message says what is wrong with it."""


class DecoderConfig(Settings):
    """The shape of a half-width decoder, as values.

    Attributes:
        latent_channels: channels of the latent, 4 in Stable Diffusion.
        out_channels: channels of the image.
        block_out_channels: width of each level, the finest first.
        layers_per_block: ResNets of a level, less one, as diffusers counts.
        norm_num_groups: groups of every GroupNorm.
        mid_block_add_attention: whether the coarsest level attends.
        use_post_quant_conv: whether a 1x1 convolution comes before the decoder.
        scaling_factor: a latent is the VAE's posterior mean times this.
    """

    latent_channels: PositiveInt
    out_channels: PositiveInt
    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    mid_block_add_attention: bool
    use_post_quant_conv: bool
    scaling_factor: PositiveFloat

    @classmethod
    def half_of(cls, vae: AutoencoderKL) -> Self:
        """Half the channels at every level, and half the groups, so that a group keeps its size.

        Raises:
            ValueError: if a width or the number of groups is odd, or the VAE's kind is another.
        """
        full = vae.config
        kinds = set(full.up_block_types)
        if kinds != {"UpDecoderBlock2D"} or full.act_fn != "silu" or full.get("shift_factor"):
            raise ValueError(
                f"the VAE has up blocks {sorted(kinds)}, activation {full.act_fn!r} and shift factor "
                f"{full.get('shift_factor')}; only UpDecoderBlock2D, 'silu' and no shift can be halved"
            )
        counts = [*full.block_out_channels, full.norm_num_groups]
        if any(count % 2 for count in counts):
            raise ValueError(f"widths and groups {counts} cannot all be halved; they must be even")
        return cls(
            latent_channels=full.latent_channels,
            out_channels=full.out_channels,
            block_out_channels=tuple(width // 2 for width in full.block_out_channels),
            layers_per_block=full.layers_per_block,
            norm_num_groups=full.norm_num_groups // 2,
            mid_block_add_attention=full.mid_block_add_attention,
            use_post_quant_conv=full.use_post_quant_conv,
            scaling_factor=full.scaling_factor,
        )


class HalfDecoder(nn.Module):
    """Latent [B,4,h,w] -> image [B,3,H,W], with about a quarter of the full decoder's weights. Sec. 3.2."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        # The 1x1 convolution works on the latent's own channels, of which none can be spared.
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, kernel_size=1) if config.use_post_quant_conv else nn.Identity()
        )
        self.decoder = Decoder(
            in_channels=channels,
            out_channels=config.out_channels,
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_add_attention,
        )

    @classmethod
    def from_vae(cls, vae: AutoencoderKL, *, init: Initialization = "leading", seed: int = 0) -> Self:
        """The half-width decoder of `vae`, float32 on the VAE's device.

        The channel choice of "leading": of every tensor of the full decoder the leading half of each
        dimension that counts channels is kept. Attention has one head, whose leading half stays. GroupNorm's
        groups are consecutive channels, and their number is halved with the width, so every group that stays
        is intact.
        "random" draws all weights but the post-quant convolution's anew from `seed`; it is there to be
        compared with.

        Raises:
            ValueError: if the VAE cannot be halved (see `DecoderConfig.half_of`).
        """
        config = DecoderConfig.half_of(vae)
        # The seed alone decides what is drawn, and the caller's generator is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            half = cls(config)
        if config.use_post_quant_conv:
            half.post_quant_conv.load_state_dict(vae.post_quant_conv.state_dict())
        if init == "leading":
            half.decoder.load_state_dict(_leading(vae.decoder, half.decoder))
        return half.to(device=vae.device)

    @property
    def num_parameters(self) -> int:
        """How many numbers training can change, the post-quant convolution's included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, latent: Tensor) -> Tensor:
        """The image, [B,3,H,W], about -1 .. 1 but not clamped, for a scaled latent [B,4,h,w]."""
        image: Tensor = self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))
        return image

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The image, [B,3,H,W] in -1 .. 1, for a scaled latent [B,4,h,w]. Without gradients."""
        return self(latent).clamp(-1.0, 1.0)

    def save(self, url: str) -> dict[str, str]:
        """Write the folder `url`; config.json comes last and names the weights' SHA-256.

        Returns:
            SHA-256 of each file, by name.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        weights = save_safetensors(tensors)
        values = {
            "_class_name": type(self).__name__,
            **self.config.to_values(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        config = json.dumps(values, indent=2, sort_keys=True).encode()
        fs, root = fsspec.core.url_to_fs(url)
        fs.makedirs(root, exist_ok=True)
        contents = {WEIGHTS: weights, CONFIG: config}
        for name, content in contents.items():
            fs.pipe_file(f"{root}/{name}", content)
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def load_decoder(url: str) -> HalfDecoder:
    """The half-width decoder in the folder `url` (a path or any fsspec URL), float32, in eval mode.

    Raises:
        DecoderError: if the folder holds pickles, a file is missing or altered, or the weights do not fit.
    """
    fs, root = fsspec.core.url_to_fs(url)
    _refuse_pickles(fs, root=root, url=url)
    values = _read_config(_read(fs, root=root, name=CONFIG, url=url), url=url)
    weights = _read(fs, root=root, name=WEIGHTS, url=url)
    expected, found = values.pop("weights_sha256", None), hashlib.sha256(weights).hexdigest()
    if expected != found:
        raise DecoderError(
            f"{url}/{WEIGHTS} was altered: {CONFIG} says SHA-256 {expected}, found {found}; copy it again"
        )
    try:
        decoder = HalfDecoder(DecoderConfig.parse(values))
        decoder.load_state_dict(load_safetensors(weights))
    except (SettingsError, SafetensorError, RuntimeError) as error:
        raise DecoderError(f"{url} does not hold a decoder that fits its {CONFIG}: {error}") from error
    return decoder.eval()


def _leading(full: nn.Module, half: nn.Module) -> Mapping[str, Tensor]:
    """The leading corner of each of `full`'s tensors, in the shape of `half`'s tensor of that name."""
    sources = full.state_dict()
    return {
        name: sources[name][tuple(slice(size) for size in tensor.shape)].clone()
        for name, tensor in half.state_dict().items()
    }


def _refuse_pickles(fs: Any, *, root: str, url: str) -> None:  # noqa: ANN401 - fsspec has no types
    if not fs.exists(root):
        raise DecoderError(f"{url} does not exist; a folder with {CONFIG} and {WEIGHTS} is needed")
    names = [PurePosixPath(path).name for path in fs.ls(root, detail=False)]
    pickles = sorted(name for name in names if PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise DecoderError(
            f"{url} holds {pickles[0]}: pickled weights can run code when read, and are refused; "
            "save them as safetensors"
        )


def _read(fs: Any, *, root: str, name: str, url: str) -> bytes:  # noqa: ANN401
    try:
        content: bytes = fs.cat_file(f"{root}/{name}")
    except FileNotFoundError:
        raise DecoderError(f"{url} has no {name}; a folder with {CONFIG} and {WEIGHTS} is needed") from None
    return content


def _read_config(content: bytes, *, url: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise DecoderError(f"{url}/{CONFIG} is not JSON: {error}") from error
    kind = values.pop("_class_name", None) if isinstance(values, dict) else None
    if kind != HalfDecoder.__name__:
        raise DecoderError(f"{url}/{CONFIG} describes a {kind}; a {HalfDecoder.__name__} is needed")
    return values
