"""Network configurations of Stable Diffusion v2.1 (768 px, v-prediction). SnapFusion Fig. 7(d)."""

from typing import Any

from snapfusion.models import sd15

UNET_PARAMETERS = 865_910_724
"""6,389,760 more than SD-v1.5, in the keys and values of a wider caption."""

UNET: dict[str, Any] = {
    **sd15.UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),  # the number of heads, as in SD-v1.5; each is 64 wide
    "use_linear_projection": True,
    "upcast_attention": True,
}

VAE: dict[str, Any] = {**sd15.VAE, "sample_size": 768}

TEXT_ENCODER: dict[str, Any] = {
    **sd15.TEXT_ENCODER,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # OpenCLIP ViT-H has 24; Stable Diffusion omits the last
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}

PADDING = "!"
"""Padding of the tokenizer: token 0, as in OpenCLIP. A "!" in a caption becomes this token too."""


def is_text_encoder(config: Any) -> bool:  # noqa: ANN401 - a configuration of transformers
    """Tell OpenCLIP's text encoder, of Stable Diffusion 2, by its activation; OpenAI's has another one."""
    return bool(config.hidden_act == TEXT_ENCODER["hidden_act"])
