"""The oracle: a small CNN that classifies the five attributes of a scene from its image.

Its 128 features, before the last nonlinearity, are also used for a Frechet distance, which is not comparable
with one on Inception's features.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from snapfusion.mini.scenes import Scene, scene_from_labels, to_signed
from snapfusion.mini.vocabulary import ATTRIBUTES, ORACLE_FEATURES, STORED_NAMES
from snapfusion.mini.weights import WEIGHTS

_WEIGHTS = "model.safetensors"


class Oracle(nn.Module):
    """images uint8 [B,3,32,32] -> 128 features -> one distribution for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(3, 24),
            *_block(24, 32, stride=2),
            *_block(32, 64, stride=2),
            *_block(64, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, ORACLE_FEATURES),
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(ORACLE_FEATURES, len(words))
                for name, words in zip(STORED_NAMES, ATTRIBUTES.values(), strict=True)
            }
        )

    def features(self, images: Tensor) -> Tensor:
        """float32 [B,128] of uint8 [B,3,32,32]."""
        return self.trunk(to_signed(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [B, number of values] of each attribute, by its name in `STORED_NAMES`."""
        hidden = functional.silu(self.features(images))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.inference_mode()
    def labels(self, images: Tensor) -> Tensor:
        """The most likely value of each attribute: int64 [B,5], in the order of `ATTRIBUTES`."""
        return torch.stack([logits.argmax(dim=1) for logits in self(images).values()], dim=1)

    def read(self, images: Tensor) -> list[Scene]:
        """The scenes that images uint8 [B,3,32,32] show."""
        return [scene_from_labels(row) for row in self.labels(images).tolist()]

    def score(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Whether each attribute matches `scenes`: bool [B,5], in the order of `ATTRIBUTES`."""
        return self.labels(images) == scene_labels(scenes)


def scene_labels(scenes: Sequence[Scene]) -> Tensor:
    """The attributes of scenes as labels: int64 [B,5]."""
    return torch.tensor([scene.labels() for scene in scenes], dtype=torch.int64)


def attribute_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over attributes and batch; labels int64 [B,5]."""
    pairs = zip(logits.values(), labels.T, strict=True)
    return torch.stack([functional.cross_entropy(values, column) for values, column in pairs]).mean()


def save_oracle(oracle: Oracle, folder: Path) -> None:
    """Write the weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in oracle.state_dict().items()}, folder / _WEIGHTS)


def load_oracle(folder: Path | None = None) -> Oracle:
    """Load the oracle of `save_oracle` in float32; without a folder, the bundled one."""
    oracle = Oracle()
    oracle.load_state_dict(load_file((folder or WEIGHTS / "oracle") / _WEIGHTS))
    return oracle.eval().requires_grad_(requires_grad=False)


def _block(before: int, after: int, *, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
    return conv, nn.GroupNorm(8, after), nn.SiLU()
