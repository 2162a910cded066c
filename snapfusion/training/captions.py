"""Caption encoding for training, with caption dropout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from snapfusion.models.bundle import Bundle
from snapfusion.noise import noise_key, uniform


class CaptionEncoder:
    """The frozen text encoder of a bundle; the empty caption is encoded once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        # Cloned: tensors created in inference mode cannot be saved for the backward pass.
        self.null = bundle.null_condition().clone()
        self._last: tuple[Tensor, Tensor] | None = None

    def encode(self, token_ids: Tensor, *, dropped: Tensor | None = None) -> Tensor:
        """Encode token ids, int64 [B,L], to c, float32 [B,L,D]; rows in `dropped`, bool [B], as empty."""
        # The losses of a step encode the same tensor, each with a dropout of its own.
        if self._last is None or self._last[0] is not token_ids:
            with torch.autocast(token_ids.device.type, enabled=False):
                self._last = token_ids, self._bundle.encode_text(token_ids).clone()
        c = self._last[1]
        return c if dropped is None else torch.where(dropped.view(-1, 1, 1), self.null, c)


def draw_caption_dropout(keys: Sequence[int], *, fraction: float) -> Tensor:
    """Draw the rows that lose their caption, bool [B]: each with probability `fraction`, by its key.

    Ours, the paper does not mention it: guidance (Eq. 3) evaluates the network on the empty caption, which
    it learns only from such rows when no loss is guided.
    """
    return torch.tensor([bool(uniform(noise_key("dropped", key), 1)[0] < fraction) for key in keys])
