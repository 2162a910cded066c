"""A list of captions as an evaluation compares it: all draws, and of COCO's captions their own images."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.evaluation.captions import all_draws, captions_of, check_split
from jobs.evaluation.coco_pairs import CocoPairs, pair_captions
from jobs.evaluation.settings import EvaluationSettings, PromptSettings
from pipelines.datasets.settings import ReferencesSettings
from pipelines.sources.captions import Caption, CaptionRow, read_captions


@dataclass(frozen=True, kw_only=True)
class CaptionList:
    """Captions and their images.

    Attributes:
        prompts: settings of the captions.
        references: settings of the real images.
        rows: of all draws; with pairs only captions that have their image.
        pairs: captions with their own images; None if the real images are others.
    """

    prompts: PromptSettings
    references: ReferencesSettings
    rows: list[CaptionRow]
    pairs: CocoPairs | None

    @property
    def once(self) -> list[CaptionRow]:
        """The rows of the first draw."""
        return self.rows[: len(self.rows) // self.prompts.draws]


def list_captions(prompts: PromptSettings, references: ReferencesSettings) -> CaptionList:
    """Read the captions, and find their images if they are pairs, of which there are `prompts.limit` at most.

    Raises:
        SourceError: if the list cannot be read, or no caption has its image.
        ValueError: if it has a caption of another of the miniature's splits.
    """
    if not (references.paired and prompts.url and references.url):
        return CaptionList(prompts=prompts, references=references, rows=captions_of(prompts), pairs=None)
    pairs = pair_captions(
        read_captions(prompts.url, prompts.reading),
        annotations=prompts.url,
        images=references.url,
        limit=prompts.limit,
    )
    check_split(pairs.captions, prompts)
    rows = all_draws(pairs.captions, prompts)
    return CaptionList(prompts=prompts, references=references, rows=rows, pairs=pairs)


def check_enough(listed: CaptionList, settings: EvaluationSettings) -> None:
    """Refuse fewer captions than intervals need, before anything is generated of them.

    Raises:
        ValueError: with the number of captions that have no image.
    """
    usable = sum(isinstance(row, Caption) for row in listed.once)
    if usable < (needed := settings.least_captions(listed.prompts)):
        lacking = 0 if listed.pairs is None else listed.pairs.without_image
        others = f" with their image, and {lacking:,} without" if lacking else ""
        raise ValueError(
            f"{listed.prompts.name} has {usable} captions{others}; {needed} are needed for "
            f"{settings.groups} groups: raise evaluation.prompts.limit or lower evaluation.groups"
        )
