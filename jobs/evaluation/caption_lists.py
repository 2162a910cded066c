"""A list of captions as an evaluation compares it: all draws, and of COCO's captions their own images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jobs.evaluation.captions import captions_of, row_of_draw
from jobs.evaluation.coco_pairs import CocoPairs, pair_captions
from jobs.evaluation.settings import PromptSettings
from pipelines.datasets.settings import ReferencesSettings
from pipelines.sources.captions import CaptionRow


@dataclass(frozen=True, kw_only=True)
class CaptionList:
    """Captions and their images.

    Attributes:
        prompts: settings of the captions.
        references: settings of the real images.
        rows: of all draws; with pairs a caption without its image is rejected.
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
    """Read the captions, and find their images if they are pairs.

    Raises:
        SourceError: if the list cannot be read, or no caption has its image.
        ValueError: if it has a caption of another of the miniature's splits.
    """
    listed = CaptionList(prompts=prompts, references=references, rows=captions_of(prompts), pairs=None)
    if not (references.paired and prompts.url and references.url):
        return listed
    pairs = pair_captions(listed.once, annotations=prompts.url, images=references.url)
    rows = [row_of_draw(row, draw) for draw in range(prompts.draws) for row in pairs.captions]
    return replace(listed, rows=rows, pairs=pairs)
