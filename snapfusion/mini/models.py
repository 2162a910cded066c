"""The miniature's architectures: small configurations of diffusers', transformers' and open_clip's classes.

text encoder   CLIPTextModel, width 64, 2 layers                        token ids [B,24] -> c [B,24,64]
VAE            AutoencoderKL, 3 levels, so f = 4                        image [B,3,32,32] <-> latent [B,4,8,8]
UNet           SD-v1.5's blocks on three levels instead of four:        z_t [B,4,8,8], t, c -> eps [B,4,8,8]
               8x8 and 4x4 with cross-attention, 2x2 without and
               the middle with it; two layers each; widths 24, 64, 64
scorer         CLIP of a small ResNet and a text transformer            see `snapfusion.metrics.clip`
oracle         see `snapfusion.mini.oracle`
"""

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from snapfusion.mini.tokenizer import MAX_LENGTH
from snapfusion.mini.vocabulary import IMAGE_SIZE
from snapfusion.schedule import Schedule

TEXT_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4

_QUIET_LOGVAR = -6.0
"""Initial log variance of the posterior, low enough that the decoder sees the image from the first step."""


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def autoencoder() -> AutoencoderKL:
    """An untrained VAE; its scaling factor is set after training, from its latents' standard deviation."""
    widths = (24, 48, 64)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )
    nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], _QUIET_LOGVAR)
    return vae


def unet() -> UNet2DConditionModel:
    """An untrained UNet: SD-v1.5's without its second stage, the one that Table 3 does not change.

    It has every kind of block that Table 3 removes or adds: cross-attention at the full resolution, ResNets
    below it and in the middle, cross-attention on the way up.
    """
    # A fourth level would leave one pixel of the 8x8 latent, where self-attention has no effect: in a
    # measurement such a middle block contributed nothing.
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(24, 64, 64),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # as in SD-v1.5's own file, this is the number of heads
        norm_num_groups=8,
    )


def scheduler(schedule: Schedule) -> DDIMScheduler:
    """SD-v1.5's scheduler file: epsilon-prediction, leading spacing."""
    return DDIMScheduler(
        num_train_timesteps=schedule.num_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def scorer_config(vocabulary: int) -> dict[str, Any]:
    """The scorer's open_clip configuration, in the two sections of open_clip's config files."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 2 * IMAGE_SIZE,
                "layers": [1, 1, 1, 1],
                "width": 12,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": MAX_LENGTH,
                "vocab_size": vocabulary,
                "width": TEXT_WIDTH,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
