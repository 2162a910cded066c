"""Noisy captions of the miniature's scenes: as on the web, some have a wrong word and some lack one.

With right captions alone a network learns to follow them without guidance, and guidance (SnapFusion Eq. 3)
has nothing left to improve.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from snapfusion.mini.captions import TEMPLATE
from snapfusion.mini.scenes import Scene, caption_of, change_one_attribute, changes_of, scene_of
from snapfusion.mini.training.settings import CaptionNoiseSettings
from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS


def caption_without(scene: Scene, attribute: str) -> str:
    """The caption with an attribute left out, such as "a red circle at the top on a white background"."""
    template = (
        TEMPLATE.replace(" on a {background} background", "") if attribute == "background" else TEMPLATE
    )
    return " ".join(template.format(**{**vars(scene), attribute: ""}).split())


def noisy_caption(scene: Scene, settings: CaptionNoiseSettings, *, kind: float, choice: float) -> str:
    """The caption of a scene, with a wrong word, without an attribute, or as it is.

    Args:
        scene: to describe.
        settings: shares.
        kind: in [0, 1): below `wrong_word` a word is wrong, then below both shares together one is left out.
        choice: in [0, 1), of the word.
    """
    if kind < settings.wrong_word:
        return caption_of(change_one_attribute(scene, draw=choice))
    if kind < settings.wrong_word + settings.missing_word:
        return caption_without(scene, tuple(ATTRIBUTES)[int(choice * len(ATTRIBUTES))])
    return caption_of(scene)


@dataclass(frozen=True, kw_only=True)
class NoisyCaptions:
    """All captions that a scene may be given in training, and their choice.

    Attributes:
        texts: right captions by number; then for each number those without one attribute; 1200 (1 + A).
        wrong: for each number those with one wrong word, int64 [1200, K].
        settings: shares.
    """

    texts: tuple[str, ...]
    wrong: Tensor
    settings: CaptionNoiseSettings

    @classmethod
    def of(cls, settings: CaptionNoiseSettings) -> Self:
        """The captions of all scenes: scene i has caption number i modulo 1200."""
        scenes = [scene_of(number) for number in range(NUM_CAPTIONS)]
        numbers = {scene: number for number, scene in enumerate(scenes)}
        incomplete = [caption_without(scene, name) for scene in scenes for name in ATTRIBUTES]
        return cls(
            texts=(*map(caption_of, scenes), *incomplete),
            wrong=torch.tensor([[numbers[other] for other in changes_of(scene)] for scene in scenes]),
            settings=settings,
        )

    def draw(self, numbers: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw a caption for each scene.

        Args:
            numbers: of the right captions, int64 [B].
            generator: of the draws.

        Returns:
            Indexes into `texts`, int64 [B].
        """
        settings = self.settings
        kind, choice = torch.rand((2, len(numbers)), generator=generator)
        wrong = self.wrong[numbers, (choice * self.wrong.shape[1]).long()]
        incomplete = NUM_CAPTIONS + numbers * len(ATTRIBUTES) + (choice * len(ATTRIBUTES)).long()
        captions = torch.where(kind < settings.wrong_word, wrong, numbers)
        is_incomplete = (kind >= settings.wrong_word) & (kind < settings.wrong_word + settings.missing_word)
        return torch.where(is_incomplete, incomplete, captions)
