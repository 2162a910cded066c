"""Pairs the captions of COCO's annotations with their own images, by image id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, CaptionRow
from pipelines.sources.coco import image_file_names
from pipelines.sources.real_images import list_real_images


@dataclass(frozen=True, kw_only=True)
class CocoPairs:
    """Captions and their images.

    Attributes:
        captions: as listed; one without an image is rejected as `missing_image`.
        image_names: of the other captions' images, in their order.
        without_image: number of captions without an image.
        without_caption: number of images that the annotations do not name.
    """

    captions: list[CaptionRow]
    image_names: list[str]
    without_image: int
    without_caption: int

    def notes(self) -> list[str]:
        """What is not as published."""
        notes = []
        if self.without_image:
            notes.append(f"captions: {self.without_image:,} have no image, and are left out")
        if self.without_caption:
            notes.append(f"images: {self.without_caption:,} are not in the annotations, and are left out")
        return notes


def pair_captions(captions: Sequence[CaptionRow], *, annotations: str, images: str) -> CocoPairs:
    """Pair captions, whose ids are those of images, with the files that the annotations name.

    Args:
        captions: listed from the annotations.
        annotations: URL of the annotations.
        images: folder of images, or of tars.

    Raises:
        SourceError: if the annotations have no images, or none of the captions' is in the folder.
    """
    file_names, found = image_file_names(annotations), list_real_images(images)
    annotated = set(file_names.values())
    by_name = {image.file_name: image.name for image in found}
    rows: list[CaptionRow] = []
    names: list[str] = []
    missing = 0
    for row in captions:
        file_name = file_names.get(row.id) if isinstance(row, Caption) else None
        if not isinstance(row, Caption):
            rows.append(row)
        elif (name := by_name.get(file_name or "")) is not None:
            rows.append(row)
            names.append(name)
        else:
            missing += 1
            fault = Rejected("missing_image", f"{file_name or 'an image that is not named'} is not there")
            rows.append(fault.record(id=row.id, source=annotations, ordinal=row.ordinal))
    if not names:
        named, there = next(iter(file_names.values())), found[0].file_name if found else "no image"
        raise SourceError(
            f"none of the {len(captions):,} captions of {annotations} has its image in {images}: the "
            f"annotations name {named}, and there is {there}; give annotations and images of one split"
        )
    return CocoPairs(
        captions=rows,
        image_names=names,
        without_image=missing,
        without_caption=sum(image.file_name not in annotated for image in found),
    )
