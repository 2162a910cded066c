"""Reads which image each id of COCO's annotations stands for."""

from typing import Any

from pipelines.sources import SourceError
from pipelines.sources.caption_json import load_json
from pipelines.storage.objects import open_object


def image_file_names(url: str) -> dict[str, str]:
    """The file name of each image id, of annotations such as `captions_val2014.json`.

    Raises:
        SourceError: if the file cannot be read, or has no list of images.
    """
    try:
        with open_object(url) as file:
            document = load_json(file)
    except FileNotFoundError:
        raise SourceError(f"{url}: no such file") from None
    except SourceError as error:
        raise SourceError(f"{url}: {error}") from None
    images = document.get("images") if isinstance(document, dict) else None
    names = {str(image["id"]): image["file_name"] for image in images or () if _is_named(image)}
    if not names:
        raise SourceError(
            f"{url} has no 'images' with 'id' and 'file_name', which pair captions with images; give COCO's "
            "captions_val2014.json or captions_val2017.json, or set evaluation.references.paired=false"
        )
    return names


def _is_named(image: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(image, dict) and "id" in image and isinstance(image.get("file_name"), str)
