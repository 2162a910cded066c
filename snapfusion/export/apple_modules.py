"""The networks with the ports of Apple's ml-stable-diffusion.

TextEncoder   input_ids [1,L] float32 -> last_hidden_state [1,L,D] float32
Unet          sample [B,4,h,w], timestep [B], encoder_hidden_states [B,D,1,L] -> noise_pred [B,4,h,w] float32
VAEDecoder    z [1,4,h,w] -> image [1,3,H,W] float32 in about -1 .. 1

Inputs are float16 where nothing is said. Its schedulers take eps: of a network that predicts v, the program
computes eps (SnapFusion Eq. 8). Its pipelines divide a latent by Stable Diffusion's scaling factor, so the
decoder's program multiplies by that factor and divides by the model's own. The second output of its text
encoder, `pooled_outputs`, is left out: its pipelines do not read it of Stable Diffusion 1 and 2.
"""

from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from snapfusion.export.modules import FixedModule, Port, TextProgram, arranged_unet
from snapfusion.export.settings import AttentionLayout
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.unet import UNetError
from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule

SCALING_FACTOR = 0.18215
"""Of Stable Diffusion's latents: its pipelines divide by this number, whatever the model."""


class AppleTextProgram(TextProgram):
    """Token ids as floating point -> the condition c."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1,L] float32 to [1,L,D]."""
        return super().forward(input_ids.to(torch.int32))


class AppleUNetProgram(nn.Module):
    """The UNet's prediction of eps for B latents at one time."""

    levels: Tensor

    def __init__(self, unet: nn.Module, *, schedule: Schedule, prediction_type: PredictionType) -> None:
        super().__init__()
        self.unet = unet
        self.predicts_v = prediction_type == "v_prediction"
        times = torch.arange(schedule.num_steps)
        levels = torch.cat([schedule.alpha(times), schedule.sigma(times)], dim=1).flatten(1)
        # [T,2]: alpha_t and sigma_t of each timestep.
        self.register_buffer("levels", levels, persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[B,4,h,w], [B] and [B,D,1,L] to [B,4,h,w]."""
        c = encoder_hidden_states.flatten(2).transpose(1, 2)
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states=c, return_dict=False)[0]
        if not self.predicts_v:
            return output
        levels = functional.embedding(timestep.to(torch.int32), self.levels)
        alpha_t, sigma_t = levels[:, :1, None, None], levels[:, 1:, None, None]
        return sigma_t * sample + alpha_t * output


class AppleDecoderProgram(nn.Module):
    """Latent over Stable Diffusion's scaling factor -> image, for the half-width or the full decoder."""

    def __init__(self, decoder: HalfDecoder | AutoencoderKL) -> None:
        super().__init__()
        self.factor = SCALING_FACTOR / float(_scaling_factor(decoder))
        self.post_quant_conv = decoder.post_quant_conv or nn.Identity()
        self.decoder = decoder.decoder

    def forward(self, z: Tensor) -> Tensor:
        """[1,4,h,w] to [1,3,H,W] in about -1 .. 1, which Apple's pipelines clamp."""
        latent = z if self.factor == 1.0 else z * self.factor
        image: Tensor = self.decoder(self.post_quant_conv(latent))
        return image


def _scaling_factor(decoder: HalfDecoder | AutoencoderKL) -> float:
    if isinstance(decoder, HalfDecoder):
        return decoder.config.scaling_factor
    return float(decoder.config["scaling_factor"])


def apple_modules(
    bundle: Bundle, *, decoder: HalfDecoder | None, conditions: Literal[1, 2], layout: AttentionLayout
) -> dict[str, FixedModule]:
    """The modules of a model by the names of Apple's packages.

    Args:
        bundle: the model; its UNet is not modified.
        decoder: its half-width decoder; None for its own.
        conditions: B, 2 for both halves of the guidance in one call.
        layout: of the UNet's attention.

    Raises:
        UNetError: if the UNet has a guidance embedding, for which there is no port.
    """
    if has_guidance_embedding(bundle.unet):
        raise UNetError("the UNet has a guidance embedding, for which Apple's layout has no port")
    length, width = bundle.tokenizer.model_max_length, bundle.text_encoder.config.hidden_size
    latent, side = bundle.latent_shape, bundle.image_size
    unet = AppleUNetProgram(
        arranged_unet(bundle.unet, layout=layout),
        schedule=bundle.schedule,
        prediction_type=bundle.prediction_type,
    )
    return {
        "TextEncoder": FixedModule(
            name="TextEncoder",
            network=AppleTextProgram(bundle.text_encoder, length=length).float().eval(),
            inputs=(Port(name="input_ids", shape=(1, length), coreml="float32"),),
            outputs=(Port(name="last_hidden_state", shape=(1, length, width), coreml="float32"),),
        ),
        "Unet": FixedModule(
            name="Unet",
            network=unet.float().eval(),
            inputs=(
                Port(name="sample", shape=(conditions, *latent)),
                Port(name="timestep", shape=(conditions,)),
                Port(name="encoder_hidden_states", shape=(conditions, width, 1, length)),
            ),
            outputs=(Port(name="noise_pred", shape=(conditions, *latent), coreml="float32"),),
        ),
        "VAEDecoder": FixedModule(
            name="VAEDecoder",
            network=AppleDecoderProgram(decoder or bundle.vae).float().eval(),
            inputs=(Port(name="z", shape=(1, *latent)),),
            outputs=(Port(name="image", shape=(1, 3, side, side), coreml="float32"),),
        ),
    }
