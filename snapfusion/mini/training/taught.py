"""The captions that the miniature is taught: as on the web, some have a wrong word and some lack one.

With right captions alone a network learns to follow them without guidance, and guidance (SnapFusion Eq. 3)
has nothing left to improve.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Self

import torch
from torch import Tensor

from snapfusion.mini.captions import TEMPLATE
from snapfusion.mini.scenes import Scene, caption_of, changes_of, numbers_in, scene_of
from snapfusion.mini.training.settings import TaughtSettings
from snapfusion.mini.vocabulary import ATTRIBUTES, NUM_CAPTIONS


def taught_numbers(settings: TaughtSettings) -> Tensor:
    """Numbers of the captions that are taught, int64 [N]: scene i has caption number i modulo 1200."""
    return torch.tensor(numbers_in("training" if settings.training_split_only else None))


def caption_without(scene: Scene, attribute: str) -> str:
    """The caption with an attribute left out, such as "a red circle at the top on a white background"."""
    template = (
        TEMPLATE.replace(" on a {background} background", "") if attribute == "background" else TEMPLATE
    )
    return " ".join(template.format(**{**vars(scene), attribute: ""}).split())


@dataclass(frozen=True, kw_only=True)
class TaughtCaptions:
    """All captions that may be taught for each scene, and their choice.

    A caption of another split is not taught as a wrong one either: a network would learn that it is always
    wrong.

    Attributes:
        texts: right captions by number; then for each number those without one attribute; 1200 (1 + A).
        wrong: for each number those of the taught captions with one wrong word, repeated to fill a row, int64
            [1200, K].
        num_wrong: different ones in each row, int64 [1200].
        settings: shares.
    """

    texts: tuple[str, ...]
    wrong: Tensor
    num_wrong: Tensor
    settings: TaughtSettings

    @classmethod
    def of(cls, settings: TaughtSettings) -> Self:
        """The captions of all scenes."""
        scenes = [scene_of(number) for number in range(NUM_CAPTIONS)]
        taught = {scenes[number]: number for number in taught_numbers(settings).tolist()}
        wrong = [[taught[other] for other in changes_of(scene) if other in taught] for scene in scenes]
        longest = max(map(len, wrong))
        incomplete = [caption_without(scene, name) for scene in scenes for name in ATTRIBUTES]
        return cls(
            texts=(*map(caption_of, scenes), *incomplete),
            wrong=torch.tensor([list(islice(cycle(row), longest)) for row in wrong]),
            num_wrong=torch.tensor([len(row) for row in wrong]),
            settings=settings,
        )

    def draw(self, numbers: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw what each scene is taught with, by the numbers of their captions.

        Args:
            numbers: of the right captions, int64 [B].
            generator: of the draws; not used if no caption is altered.

        Returns:
            Indexes into `texts`, int64 [B].
        """
        settings = self.settings
        if not settings.wrong_word and not settings.missing_word:
            return numbers
        kind, choice = torch.rand((2, len(numbers)), generator=generator)
        wrong = self.wrong[numbers, (choice * self.num_wrong[numbers]).long()]
        incomplete = NUM_CAPTIONS + numbers * len(ATTRIBUTES) + (choice * len(ATTRIBUTES)).long()
        taught = torch.where(kind < settings.wrong_word, wrong, numbers)
        is_incomplete = (kind >= settings.wrong_word) & (kind < settings.wrong_word + settings.missing_word)
        return torch.where(is_incomplete, incomplete, taught)

    def wrong_scenes(self, scene: Scene) -> list[Scene]:
        """The scenes of the taught captions that differ in one attribute."""
        return [other for other in changes_of(scene) if other in self._taught_scenes]

    @functools.cached_property
    def _taught_scenes(self) -> frozenset[Scene]:
        return frozenset(map(scene_of, taught_numbers(self.settings).tolist()))


def draw_taught(captions: TaughtCaptions, scenes: Sequence[int], *, generator: torch.Generator) -> list[str]:
    """The texts that scenes, given by their indexes, are taught with."""
    indexes = captions.draw(torch.tensor(scenes) % NUM_CAPTIONS, generator=generator)
    return [captions.texts[index] for index in indexes.tolist()]
