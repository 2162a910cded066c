"""A complete Stable Diffusion model: text encoder, UNet, VAE and schedule."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from snapfusion.models.guidance_embedding import guidance_embedding, has_guidance_embedding
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.tokenizer import tokenize
from snapfusion.models.unet import resize_unet
from snapfusion.prediction_types import PredictionType
from snapfusion.sampling import Denoiser, guide, rescale
from snapfusion.schedule import Estimate, Schedule


@dataclass(kw_only=True)
class Bundle:
    """A teacher or student model.

    symbol   meaning                                shape
    c        encoded caption                        [B,L,D] float32
    z_t      noisy latent, unit variance            [B,4,h,w] float32
    w        guidance scale, 1 is no guidance       a number, or [B,1,1,1]

    Networks run in their own dtype; all arithmetic around them is float32. `distillation` holds the steps and
    guidance of a distilled model (`snapfusion.models.distillation_record`), None for any other. `merged`
    lists the LoRAs and textual inversions in the weights, by file name and SHA-256, with weight or token.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel | BlockUNet
    vae: AutoencoderKL
    schedule: Schedule
    prediction_type: PredictionType
    source: str
    distillation: Mapping[str, Any] | None = None
    merged: list[dict[str, Any]] = field(default_factory=list)
    _fingerprint: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for network in self.networks.values():
            network.eval().requires_grad_(requires_grad=False)

    @property
    def networks(self) -> dict[str, Any]:
        """The networks by folder name."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def added_tokens(self) -> list[str]:
        """The tokens of textual inversions, in the order of their ids."""
        added = sorted(self.tokenizer.get_added_vocab().items(), key=lambda item: item[1])
        return [token for token, _ in added if token not in self.tokenizer.all_special_tokens]

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.unet.device

    @property
    def scaling_factor(self) -> float:
        """Factor from the VAE's posterior mean to a latent, applied exactly once."""
        return float(self.vae.config["scaling_factor"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, h, w) of the UNet's latents."""
        size = int(self.unet.config["sample_size"])
        return int(self.unet.config["in_channels"]), size, size

    @property
    def cell(self) -> int:
        """Pixels per latent element along a side: 8 in Stable Diffusion."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def granularity(self) -> int:
        """Pixels of which image sides must be multiples, so that each level of the UNet halves evenly."""
        return int(self.cell * 2 ** (len(self.unet.down_blocks) - 1))

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.latent_shape[1] * self.cell

    def resize(self, size: int) -> Self:
        """Set the image size in pixels; saved with the model. No weight depends on it.

        Raises:
            ValueError: unless the size is a multiple of the granularity.
        """
        if size < 1 or size % self.granularity:
            raise ValueError(f"size is {size}; {self.source} needs a multiple of {self.granularity}")
        if size != self.image_size:
            resize_unet(self.unet, side=size // self.cell)
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the networks; the fingerprint stays that of the weights as loaded."""
        self.fingerprint()  # before a cast changes the values
        for network in self.networks.values():
            # diffusers' own `to` warns about modules to keep in float32, which these networks do not have.
            nn.Module.to(network, device=device, dtype=dtype)
        return self

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of each network, independent of their file format."""
        if not self._fingerprint:
            self._fingerprint = {name: weight_hash(network) for name, network in self.networks.items()}
        return dict(self._fingerprint)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions to int64 [B,L]."""
        return tokenize(self.tokenizer, captions)

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        """Encode token ids, int64 [B,L], to the condition c, float32 [B,L,D]."""
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    def null_condition(self) -> Tensor:
        """Encode the empty caption, float32 [1,L,D]: the unconditional input of SnapFusion Eq. 3."""
        return self.encode_text(self.tokenize([""]))

    def predict(self, z_t: Tensor, t: Tensor, c: Tensor, *, w: Tensor | float = 1.0) -> Tensor:
        """Run the UNet: eps or v, float32 [B,4,h,w]; only a w-conditioned UNet uses `w`."""
        dtype, timestep_cond = self.unet.dtype, None
        if has_guidance_embedding(self.unet):
            scale = torch.as_tensor(w, dtype=torch.float32, device=z_t.device).flatten().expand(len(z_t))
            size = int(self.unet.config["time_cond_proj_dim"])
            timestep_cond = guidance_embedding(scale, size=size).to(dtype)
        condition = {"encoder_hidden_states": c.to(dtype), "timestep_cond": timestep_cond}
        return self.unet(z_t.to(dtype), t, **condition).sample.float()

    def denoiser(
        self,
        c: Tensor,
        *,
        w: Tensor | float = 1.0,
        c_null: Tensor | None = None,
        rescaled: float = 0.0,
        interval: tuple[int, int] | None = None,
    ) -> Denoiser:
        """Bind caption and guidance to the UNet. SnapFusion Eq. 3 (Eq. 10 for v).

        Both halves of the guidance are one batch of 2B. The unconditional half is not computed for w = 1
        given as a number, nor for a w-conditioned UNet.

        Args:
            c: encoded captions, [B,L,D].
            w: guidance, a number or [B,1,1,1].
            c_null: the encoded empty caption; None encodes it.
            rescaled: share of the rescaled output (`snapfusion.sampling.rescale`).
            interval: first and last timestep with guidance (Kynkäänniemi et al. 2024), for batches of one
                timestep; at others w is 1. None guides everywhere.
        """
        w_conditioned = has_guidance_embedding(self.unet)

        def is_guided(scale: Tensor | float) -> bool:
            return not w_conditioned and (isinstance(scale, Tensor) or scale != 1.0)

        if c_null is None and is_guided(w):
            c_null = self.null_condition()

        def denoise(z_t: Tensor, t: Tensor) -> Estimate:
            scale = w if interval is None or interval[0] <= int(t[0]) <= interval[1] else 1.0
            if not is_guided(scale):
                output = self.predict(z_t, t, c, w=scale)
            else:
                # The unconditional half first, as in diffusers.
                both = torch.cat([c_null.expand_as(c), c])  # type: ignore[union-attr]
                uncond, cond = self.predict(z_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
                output = guide(cond=cond, uncond=uncond, w=scale)
                if rescaled:
                    output = rescale(output, cond=cond, share=rescaled)
            return self.schedule.estimate(output, z_t=z_t, t=t, prediction_type=self.prediction_type)

        return denoise

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B,3,H,W] to latents float32 [B,4,h,w]: posterior mean times scaling factor."""
        pixels = images.to(device=self.device, dtype=torch.float32) / 127.5 - 1.0
        # The mean, not a sample of the posterior: a latent is then a function of its image.
        mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents float32 [B,4,h,w] to images float32 [B,3,H,W], clamped to [-1, 1]."""
        unscaled = latents.to(self.device) / self.scaling_factor
        return self.vae.decode(unscaled.to(self.vae.dtype)).sample.float().clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """Identify the model in tables and checkpoints that were made with it."""
        merged = {"merged": self.merged} if self.merged else {}
        tokens = {"added_tokens": self.added_tokens} if self.added_tokens else {}
        return {
            **merged,
            **tokens,
            "weights": self.fingerprint(),
            "prediction_type": self.prediction_type,
            "scaling_factor": self.scaling_factor,
            "latent_shape": list(self.latent_shape),
            "schedule": asdict(self.schedule),
        }


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images in [-1, 1] to uint8 of the same shape, rounded to nearest."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def weight_hash(network: nn.Module) -> str:
    """SHA-256 over the names, shapes and float32 values of a network's tensors."""
    sha = hashlib.sha256()
    # Sorted and in float32, so that neither the order in the file nor its dtype matters.
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().data)
    return sha.hexdigest()
