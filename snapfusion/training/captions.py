"""Captions as what networks are conditioned on, some of them left out so that the empty one is learnt too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snapfusion.models.bundle import Bundle
from snapfusion.noise import noise_key, uniform


class CaptionEncoder:
    """The frozen text encoder of a bundle; its empty caption is encoded once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        # Copies, because what is made under inference mode cannot be kept for a backward pass.
        self.null = bundle.null_condition().clone()

    def encode(self, token_ids: Tensor, *, dropped: Tensor | None = None) -> Tensor:
        """c, float32 [B,L,D], of token ids int64 [B,L]; where `dropped`, bool [B], the empty caption's."""
        with torch.autocast(token_ids.device.type, enabled=False):
            c = self._bundle.encode_text(token_ids).clone()
        return c if dropped is None else torch.where(dropped.view(-1, 1, 1), self.null, c)


def draw_caption_dropout(keys: Sequence[int], *, fraction: float) -> Tensor:
    """Which rows go without their caption, bool [B]: each with probability `fraction`, by its key.

    Ours: the paper says nothing of it, but w > 1 asks the network about the empty caption (Eq. 3), which is
    learnt from nothing else where no loss is guided.
    """
    return torch.tensor([bool(uniform(noise_key("dropped", key), 1)[0] < fraction) for key in keys])
