"""A whole Stable Diffusion: text encoder, UNet, VAE and schedule, behind the few verbs the method needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from snapfusion.models.guidance_embedding import guidance_embedding, has_guidance_embedding
from snapfusion.models.tokenizer import tokenize
from snapfusion.models.unet import BlockUNet, resize_unet
from snapfusion.sampling import Denoiser, guide
from snapfusion.schedule import Estimate, PredictionType, Schedule


@dataclass(kw_only=True)
class Bundle:
    """The teacher or the student as one thing.

    letter   meaning                                shape
    c        encoded caption                        [B,L,D] float32
    z_t      noisy latent, unit variance            [B,4,h,w] float32
    w        guidance scale, 1 is no guidance       a number, or [B,1,1,1]

    The networks run in the dtype they hold; all arithmetic round them is float32. `distillation` says, of a
    model that was distilled, for which steps and guidance (`snapfusion.models.save.DISTILLATION_FILE`).
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel | BlockUNet
    vae: AutoencoderKL
    schedule: Schedule
    prediction_type: PredictionType
    source: str
    distillation: Mapping[str, Any] | None = None
    _fingerprint: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for network in self.networks.values():
            network.eval().requires_grad_(requires_grad=False)

    @property
    def networks(self) -> dict[str, Any]:
        """The three networks by the names of their folders."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    @property
    def scaling_factor(self) -> float:
        """What the posterior mean is multiplied by, exactly once, to make a latent."""
        return float(self.vae.config["scaling_factor"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(4, h, w) of the UNet's latents."""
        size = int(self.unet.config["sample_size"])
        return int(self.unet.config["in_channels"]), size, size

    @property
    def cell(self) -> int:
        """Pixels of an image's side behind one element of the latent's: 8 in Stable Diffusion."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def granularity(self) -> int:
        """What an image's sides are multiples of, in pixels, so that each level of the UNet halves evenly."""
        return int(self.cell * 2 ** (len(self.unet.down_blocks) - 1))

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.latent_shape[1] * self.cell

    def resize(self, size: int) -> Self:
        """Draw images of `size` pixels from now on, and say so where the model is saved; weights stay.

        Raises:
            ValueError: if the size is no multiple of the granularity.
        """
        if size < 1 or size % self.granularity:
            raise ValueError(f"size {size} given; {self.source} draws multiples of {self.granularity}")
        if size != self.image_size:
            resize_unet(self.unet, side=size // self.cell)
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the networks; their fingerprint stays that of the weights as loaded."""
        self.fingerprint()
        for network in self.networks.values():
            # diffusers' own `to` warns of modules to keep in float32, of which these networks have none.
            nn.Module.to(network, device=device, dtype=dtype)
        return self

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of each network, whatever file they came from."""
        if not self._fingerprint:
            self._fingerprint = {name: weight_hash(network) for name, network in self.networks.items()}
        return dict(self._fingerprint)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions as token ids, int64 [B,L]."""
        return tokenize(self.tokenizer, captions)

    @torch.inference_mode()
    def encode_text(self, ids: Tensor) -> Tensor:
        """The condition c, float32 [B,L,D], of token ids int64 [B,L]."""
        hidden = self.text_encoder(ids.to(self.device)).last_hidden_state
        return hidden.float()

    def null_condition(self) -> Tensor:
        """The encoded empty string, float32 [1,L,D]: what "unconditional" means in SnapFusion Eq. 3."""
        return self.encode_text(self.tokenize([""]))

    def predict(self, z_t: Tensor, t: Tensor, c: Tensor, *, w: Tensor | float = 1.0) -> Tensor:
        """The UNet's own output, eps or v, float32 [B,4,h,w]; `w` matters to a UNet that is told it alone."""
        dtype, heard = self.unet.dtype, None
        if has_guidance_embedding(self.unet):
            scale = torch.as_tensor(w, dtype=torch.float32, device=z_t.device).flatten().expand(len(z_t))
            size = int(self.unet.config["time_cond_proj_dim"])
            heard = guidance_embedding(scale, size=size).to(dtype)
        output: Tensor = self.unet(
            z_t.to(dtype), t, encoder_hidden_states=c.to(dtype), timestep_cond=heard
        ).sample
        return output.float()

    def denoiser(self, c: Tensor, *, w: Tensor | float = 1.0, c_null: Tensor | None = None) -> Denoiser:
        """The teacher with caption and guidance bound. SnapFusion Eq. 3 (Eq. 10 for v).

        Both halves of the guidance go through the UNet as one batch of 2B. With w = 1 as a number the
        unconditional half is not computed, and a UNet that is told w needs none.
        """
        unguided = has_guidance_embedding(self.unet) or (not isinstance(w, Tensor) and w == 1.0)
        if c_null is None and not unguided:
            c_null = self.null_condition()

        def denoise(z_t: Tensor, t: Tensor) -> Estimate:
            if unguided:
                output = self.predict(z_t, t, c, w=w)
            else:
                both = torch.cat([c_null.expand_as(c), c])  # type: ignore[union-attr]
                uncond, cond = self.predict(z_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
                output = guide(cond=cond, uncond=uncond, w=w)
            return self.schedule.estimate(output, z_t=z_t, t=t, prediction_type=self.prediction_type)

        return denoise

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents float32 [B,4,h,w] of uint8 images [B,3,H,W]: posterior mean times the scaling factor."""
        pixels = images.to(device=self.device, dtype=torch.float32) / 127.5 - 1.0
        mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 [B,3,H,W] in [-1, 1], clamped, of latents float32 [B,4,h,w]."""
        unscaled = latents.to(self.device) / self.scaling_factor
        images: Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return images.float().clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """What identifies the model to a table or a checkpoint that was made with it."""
        return {
            "weights": self.fingerprint(),
            "prediction_type": self.prediction_type,
            "scaling_factor": self.scaling_factor,
            "latent_shape": list(self.latent_shape),
            "schedule": {
                "num_steps": self.schedule.num_steps,
                "beta_start": self.schedule.beta_start,
                "beta_end": self.schedule.beta_end,
            },
        }


def to_uint8(images: Tensor) -> Tensor:
    """Images float [-1, 1] as uint8 of the same shape, rounded to nearest."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def weight_hash(network: nn.Module) -> str:
    """SHA-256 over the names, shapes and float32 values of a network's tensors."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().data)
    return sha.hexdigest()
