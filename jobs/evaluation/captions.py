"""The captions that models are compared on: those of a list, or of the miniature's held-out scenes."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import get_args

from jobs.evaluation.settings import PromptSettings
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, CaptionRow, read_captions
from snapfusion.mini.scenes import HELD_OUT, caption_of, held_out_index, scene_of
from snapfusion.mini.split import Split, captions_in


def captions_of(prompts: PromptSettings) -> list[CaptionRow]:
    """Every caption once, then again for each further draw.

    Raises:
        SourceError: if the list cannot be read, or is empty.
        ValueError: if it has a caption of another of the miniature's splits.
    """
    return all_draws(_captions_once(prompts), prompts)


def all_draws(captions: Sequence[CaptionRow], prompts: PromptSettings) -> list[CaptionRow]:
    """The captions once for each draw."""
    return [row_of_draw(row, draw) for draw in range(prompts.draws) for row in captions]


def row_of_draw(row: CaptionRow, draw: int) -> CaptionRow:
    """The row of a further draw, whose id, and with it the noise, is its own; draw 0 is the row itself."""
    return row if draw == 0 else replace(row, id=f"{row.id}-draw{draw}")


def check_disjoint(
    captions: Sequence[CaptionRow], others: Sequence[CaptionRow], *, names: tuple[str, str]
) -> None:
    """Raise `ValueError` if a caption is in both lists, given with their names."""
    texts = {row.text for row in others if isinstance(row, Caption)}
    for row in captions:
        if isinstance(row, Caption) and row.text in texts:
            raise ValueError(f"{names[0]} and {names[1]} both have {row.text!r}; give lists without overlap")


def _captions_once(prompts: PromptSettings) -> list[CaptionRow]:
    if prompts.url is not None:
        captions = list(islice(read_captions(prompts.url, prompts.reading), prompts.limit))
        if not captions:
            raise SourceError(f"{prompts.url} has no captions; give another list")
        check_split(captions, prompts)
        return captions
    count = prompts.num_images // prompts.draws
    indexes = [held_out_index(position, split=prompts.split) for position in range(count)]
    return [
        Caption(id=f"scene-{index}", ordinal=ordinal, text=caption_of(scene_of(HELD_OUT + index)))
        for ordinal, index in enumerate(indexes)
    ]


def check_split(captions: Sequence[CaptionRow], prompts: PromptSettings) -> None:
    """Raise `ValueError` for a caption of another split; those that are none of the miniature's are fine."""
    if (split := prompts.split) is None:
        return
    others = {text: other for other in get_args(Split) if other != split for text in captions_in(other)}
    for row in captions:
        if isinstance(row, Caption) and (other := others.get(row.text)):
            raise ValueError(
                f"{prompts.url}: {row.text!r} is of the miniature's {other} split, not of its {split} split; "
                "set split to null to accept it"
            )
