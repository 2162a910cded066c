"""Contrastive training of captions and images (Radford et al. 2021) with hard negative captions.

Each image is matched with its own caption among those of the batch and three more in which one attribute is
changed. The conditioning text encoder is trained in this way against an image tower that is then discarded,
and so is the scorer, from another seed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from snapfusion.mini.models import TEXT_WIDTH
from snapfusion.mini.oracle import Oracle
from snapfusion.mini.scenes import caption_of, change_one_attribute, scene_of, to_signed
from snapfusion.mini.vocabulary import ORACLE_FEATURES

NEGATIVES = 3
"""Captions with one wrong attribute, for each image."""

_LOG_TEMPERATURE = 2.66
"""Initial logarithm of the learned factor on the cosine: CLIP's 1/0.07."""
_MAX_LOG_TEMPERATURE = 4.6


class TextTower(nn.Module):
    """A CLIP text model with projections and the image tower that it is trained against."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
        self.image_tower = Oracle().trunk
        self.image_projection = nn.Linear(ORACLE_FEATURES, TEXT_WIDTH, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(_LOG_TEMPERATURE))

    def encode_image(self, images: Tensor) -> Tensor:
        """float32 [B,64] of uint8 [B,3,32,32]."""
        return self.image_projection(functional.silu(self.image_tower(to_signed(images))))

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """float32 [B,64] of int64 [B,L]."""
        return self.text_projection(self.text_encoder(token_ids).pooler_output)


def contrastive_loss(*, images: Tensor, texts: Tensor, log_temperature: Tensor) -> Tensor:
    """The symmetric cross-entropy.

    Args:
        images: [B,D].
        texts: [(1 + NEGATIVES) B, D], the true captions first, then the altered ones of each image in turn.
        log_temperature: scalar, the logarithm of the factor on the cosine.
    """
    images, texts = functional.normalize(images, dim=1), functional.normalize(texts, dim=1)
    batch = len(images)
    true, altered = texts[:batch], texts[batch:].view(batch, NEGATIVES, -1)
    # Clamped at about 100, as CLIP does, because larger factors make the training unstable.
    factor = log_temperature.clamp(max=_MAX_LOG_TEMPERATURE).exp()
    among_batch = factor * images @ true.T
    among_altered = factor * torch.einsum("bd,bnd->bn", images, altered)
    labels = torch.arange(batch, device=images.device)
    by_image = functional.cross_entropy(torch.cat([among_batch, among_altered], dim=1), labels)
    return (by_image + functional.cross_entropy(among_batch.T, labels)) / 2.0


def draw_captions(indexes: Sequence[int], generator: torch.Generator) -> list[str]:
    """The captions of scenes, then `NEGATIVES` altered ones of each in turn."""
    scenes = [scene_of(index) for index in indexes]
    draws = torch.rand((len(scenes), NEGATIVES), generator=generator, dtype=torch.float64).tolist()
    pairs = zip(scenes, draws, strict=True)
    altered = [change_one_attribute(scene, draw=draw) for scene, row in pairs for draw in row]
    return [caption_of(scene) for scene in [*scenes, *altered]]
