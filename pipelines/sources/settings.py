"""Settings of shards, URL lists and caption lists."""

from __future__ import annotations

from pydantic import Field

from pipelines.sources.text import MAX_CAPTION_CHARS
from snapfusion.settings import Settings


class CaptionSettings(Settings):
    """What to read of a caption list.

    Attributes:
        caption_column: the column or key that holds the caption; a .txt has none.
        id_column: the column or key that holds a unique id; None: the row's position is its id.
        max_caption_chars: longer captions are cut.
    """

    caption_column: str = "caption"
    id_column: str | None = None
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)


class LinkSettings(Settings):
    """What to read of a URL list.

    Attributes:
        url_column: the column of URLs; None takes the first that is there of `SPELLINGS["url"]`.
        caption_column: likewise of captions. laion-coco has two: `TEXT` is what the web said of the picture
            and what None takes, `top_caption` what a model did.
        max_caption_chars: longer captions are cut.
    """

    url_column: str | None = None
    caption_column: str | None = None
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)


class ShardSettings(Settings):
    """Bounds on what is read into memory, bytes and characters."""

    max_image_bytes: int = Field(64 << 20, ge=1)
    max_text_bytes: int = Field(1 << 20, ge=1)
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)
