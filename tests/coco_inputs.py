"""Annotations and images of COCO's form: two captions an image, annotations in another order than images."""

import json
from pathlib import Path

from PIL import Image

from snapfusion.mini.scenes import HELD_OUT, caption_of, captioned_image, scene_of

IDS = [503, 42, 7, 391, 88, 19, 260, 75]
YEARS = {2014: "COCO_val2014_{:012d}.jpg", 2017: "{:012d}.jpg"}


def write_annotations(folder: Path, *, year: int, ids: list[int] = IDS) -> str:
    images = [{"id": id_, "file_name": YEARS[year].format(id_), "license": 4} for id_ in sorted(ids)]
    annotations = [
        {"image_id": id_, "id": 10 * id_ + again, "caption": caption_of(scene_of(HELD_OUT + id_ + again))}
        for again in (0, 1)
        for id_ in ids
    ]
    path = folder / f"captions_val{year}.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return str(path)


def write_images(folder: Path, *, year: int, ids: list[int] = IDS) -> str:
    target = folder / f"val{year}"
    target.mkdir()
    for id_ in ids:
        image, _ = captioned_image(HELD_OUT + id_)
        Image.fromarray(image).save(target / YEARS[year].format(id_), quality=95)
    return str(target)


def prompt_options(annotations: object, images: object) -> tuple[str, ...]:
    """Settings of an evaluation of these captions and their own images."""
    return (
        *("prompts.name=coco", f"prompts.url={annotations}", "prompts.reading.id_column=image_id"),
        *("references.name=coco", f"references.url={images}", "references.paired=true"),
        "references.size=32",
        *("prompts.split=null", "prompts.draws=1"),
    )
