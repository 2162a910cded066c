"""Settings of the readers of shards, URL lists and caption lists."""

from pydantic import Field

from pipelines.sources.text import MAX_CAPTION_CHARS
from snapfusion.settings import Settings


class ShardSettings(Settings):
    """Limits on what is read into memory, in bytes and characters; longer captions are truncated."""

    max_image_bytes: int = Field(64 << 20, ge=1)
    max_text_bytes: int = Field(1 << 20, ge=1)
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)


class LinkSettings(Settings):
    """Columns of a URL list.

    Attributes:
        url_column: the column of URLs; None takes the first that exists of `layouts.SPELLINGS["url"]`.
        caption_column: likewise for captions. laion-coco has two: `TEXT` is the web's alt-text, which None
            takes, and `top_caption` is synthetic.
        max_caption_chars: longer captions are truncated.
    """

    url_column: str | None = None
    caption_column: str | None = None
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)


class CaptionSettings(Settings):
    """Columns of a caption list.

    Attributes:
        caption_column: the column or key of captions; None takes the first that exists of
            `layouts.SPELLINGS["caption"]`. A .txt, and JSON strings, have none.
        id_column: the column or key of unique ids; None uses the row's position as its id. With "image_id"
            only the first caption of each image is read from COCO's annotations.
        max_caption_chars: longer captions are truncated.
    """

    caption_column: str | None = None
    id_column: str | None = None
    max_caption_chars: int = Field(MAX_CAPTION_CHARS, ge=1)
