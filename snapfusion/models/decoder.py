"""The efficient image decoder: Stable Diffusion's decoder at half its width. SnapFusion Sec. 3.2 and B.2.

It is saved as a folder of config.json, which holds the SHA-256 of the weights, and decoder.safetensors. Its
input is a scaled latent: posterior mean times the VAE's scaling factor.
"""

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from pydantic import PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from snapfusion.models.settings import Initialization
from snapfusion.records import RecordError, parse_record
from snapfusion.settings import Settings, SettingsError
from snapfusion.storage import store_of

CONFIG = "config.json"
WEIGHTS = "decoder.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class DecoderError(ValueError):
    """A decoder folder that is incomplete, altered or unsafe."""


class DecoderConfig(Settings):
    """Configuration of a half-width decoder.

    Attributes:
        latent_channels: channels of the latent, 4 in Stable Diffusion.
        out_channels: channels of the image.
        block_out_channels: width of each level, the finest first.
        layers_per_block: ResNet blocks of a level minus one, as diffusers counts.
        norm_num_groups: groups of every GroupNorm.
        mid_block_add_attention: whether the coarsest level has attention.
        use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
        scaling_factor: from the VAE's posterior mean to a latent.
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
        """Halve the channels of every level, and the groups, so that a group keeps its size.

        Raises:
            ValueError: if a width or the number of groups is odd, or the VAE's architecture is unsupported.
        """
        full = vae.config
        kinds = set(full.up_block_types)
        if kinds != {"UpDecoderBlock2D"} or full.act_fn != "silu" or full.get("shift_factor"):
            raise ValueError(
                f"the VAE has up blocks {sorted(kinds)}, activation {full.act_fn!r} and shift factor "
                f"{full.get('shift_factor')}; only UpDecoderBlock2D, 'silu' and no shift are supported"
            )
        counts = [*full.block_out_channels, full.norm_num_groups]
        if any(count % 2 for count in counts):
            raise ValueError(f"widths and groups are {counts}; they must be even to be halved")
        halved = {
            "block_out_channels": tuple(width // 2 for width in full.block_out_channels),
            "norm_num_groups": full.norm_num_groups // 2,
        }
        return cls(**{name: full[name] for name in cls.model_fields} | halved)


class HalfDecoder(nn.Module):
    """Latent [B,4,h,w] -> image [B,3,H,W] with a quarter of the full decoder's parameters. Sec. 3.2."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        # Not halved: the 1x1 convolution mixes the channels of the latent itself.
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, kernel_size=1) if config.use_post_quant_conv else nn.Identity()
        )
        self.decoder = Decoder(
            in_channels=channels,
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            **config.model_dump(exclude={"latent_channels", "use_post_quant_conv", "scaling_factor"}),
        )

    @classmethod
    def from_vae(cls, vae: AutoencoderKL, *, init: Initialization = "leading", seed: int = 0) -> Self:
        """Create the half-width decoder of `vae`, float32 on the VAE's device.

        "leading" keeps the leading half of each channel dimension of every tensor. Attention has one head,
        of which the leading half remains. The groups of a GroupNorm are consecutive channels and their number
        is halved too, so the remaining groups are complete.
        "random" draws all weights but those of the post-quant convolution from `seed`, for comparison.

        Raises:
            ValueError: if the VAE cannot be halved (see `DecoderConfig.half_of`).
        """
        config = DecoderConfig.half_of(vae)
        # Forked, so that the weights follow from the seed alone and the caller's generator is unchanged.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            half = cls(config)
        if config.use_post_quant_conv:
            half.post_quant_conv.load_state_dict(vae.post_quant_conv.state_dict())
        if init == "leading":
            full = vae.decoder.state_dict()
            half.decoder.load_state_dict(
                {
                    name: full[name][tuple(slice(size) for size in tensor.shape)]
                    for name, tensor in half.decoder.state_dict().items()
                }
            )
        return half.to(device=vae.device)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, including the post-quant convolution."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, latent: Tensor) -> Tensor:
        """Decode a scaled latent [B,4,h,w] to an image [B,3,H,W], about -1 .. 1 but not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.config.scaling_factor))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode a scaled latent [B,4,h,w] to an image [B,3,H,W] clamped to -1 .. 1, without gradients."""
        return self(latent).clamp(-1.0, 1.0)

    def save(self, url: str) -> dict[str, str]:
        """Write the folder `url`: first the weights, then config.json with their SHA-256.

        Returns:
            The SHA-256 of each file, by name.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        weights = save_safetensors(tensors)
        values = {
            "_class_name": type(self).__name__,
            **self.config.to_values(),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        config = json.dumps(values, indent=2, sort_keys=True).encode()
        fs, root = store_of(url)
        fs.makedirs(root, exist_ok=True)
        contents = {WEIGHTS: weights, CONFIG: config}
        for name, content in contents.items():
            fs.pipe_file(f"{root}/{name}", content)
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def load_decoder(url: str) -> HalfDecoder:
    """Load the half-width decoder in the folder `url` (a path or any fsspec URL), float32, in eval mode.

    Raises:
        DecoderError: if the folder holds pickles, a file is missing or altered, or the weights do not fit.
    """
    fs, root = store_of(url)
    needed = f"a folder with {CONFIG} and {WEIGHTS} is needed"
    if not fs.exists(root):
        raise DecoderError(f"{url} does not exist; {needed}")
    paths = [PurePosixPath(path) for path in fs.ls(root, detail=False)]
    if pickles := sorted(path.name for path in paths if path.suffix.lower() in PICKLE_SUFFIXES):
        raise DecoderError(
            f"{url} holds {pickles[0]}: pickled weights can run code when read, and are refused; "
            "save them as safetensors"
        )
    contents: dict[str, bytes] = {}
    for name in (CONFIG, WEIGHTS):
        try:
            contents[name] = fs.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            raise DecoderError(f"{url} has no {name}; {needed}") from None
    values, weights = _parse_config(contents[CONFIG], url=url), contents[WEIGHTS]
    expected, actual = values.pop("weights_sha256", None), hashlib.sha256(weights).hexdigest()
    if expected != actual:
        raise DecoderError(f"{url}/{WEIGHTS} was altered: SHA-256 {actual}, not {expected}; copy it again")
    try:
        decoder = HalfDecoder(DecoderConfig.parse(values))
        decoder.load_state_dict(load_safetensors(weights))
    except (SettingsError, SafetensorError, RuntimeError) as error:
        raise DecoderError(f"{url} does not hold a decoder that fits its {CONFIG}: {error}") from error
    return decoder.eval()


def _parse_config(content: bytes, *, url: str) -> dict[str, Any]:
    try:
        values = parse_record(content, name=f"{url}/{CONFIG}")
    except RecordError as error:
        raise DecoderError(str(error)) from None
    kind = values.pop("_class_name", None)
    if kind != HalfDecoder.__name__:
        raise DecoderError(f"{url}/{CONFIG} describes a {kind}; a {HalfDecoder.__name__} is needed")
    return values
