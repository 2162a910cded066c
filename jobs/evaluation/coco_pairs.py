"""Pairs the captions of COCO's annotations with their own images, by image id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, CaptionRow
from pipelines.sources.coco import image_file_names
from pipelines.sources.real_images import list_real_images


@dataclass(frozen=True, kw_only=True)
class CocoPairs:
    """Captions and their images.

    Attributes:
        captions: that have an image, in their order; among them the rows that are no usable captions.
        image_names: of the captions' images, in the same order.
        missing_images: file names of images that are not there, of captions before the last pair.
        without_caption: number of images that the annotations do not name.
    """

    captions: list[CaptionRow]
    image_names: list[str]
    missing_images: list[str]
    without_caption: int

    @property
    def without_image(self) -> int:
        """Number of captions that have no image."""
        return len(self.missing_images)

    def notes(self) -> list[str]:
        """What is not as published."""
        notes = []
        if self.missing_images:
            example = self.missing_images[0]
            notes.append(f"captions: {self.without_image:,} have no image ({example}, ...), and are left out")
        if self.without_caption:
            notes.append(f"images: {self.without_caption:,} are not in the annotations, and are left out")
        return notes


def pair_captions(captions: Iterable[CaptionRow], *, annotations: str, images: str, limit: int) -> CocoPairs:
    """Pair captions, whose ids are those of images, with the files that the annotations name.

    Args:
        captions: of the annotations.
        annotations: their URL.
        images: folder of images, or of tars.
        limit: pairs at most.

    Raises:
        SourceError: if the annotations have no images or captions, or none of the captions' is in the folder.
    """
    file_names, found = image_file_names(annotations), list_real_images(images)
    by_name = {image.file_name: image.name for image in found}
    rows: list[CaptionRow] = []
    names: list[str] = []
    missing: list[str] = []
    for row in captions:
        if len(names) == limit:
            break
        if not isinstance(row, Caption):
            rows.append(row)
            continue
        file_name = file_names.get(row.id, f"the image of id {row.id}")
        if file_name in by_name:
            rows.append(row)
            names.append(by_name[file_name])
        else:
            missing.append(file_name)
    if not (rows or missing):
        raise SourceError(f"{annotations} has no captions; give another list")
    if not names:
        named, there = next(iter(file_names.values())), found[0].file_name if found else "no image"
        raise SourceError(
            f"none of the {len(missing):,} captions of {annotations} has its image in {images}: the "
            f"annotations name {named}, and there is {there}; give annotations and images of one split"
        )
    annotated = set(file_names.values())
    return CocoPairs(
        captions=rows,
        image_names=names,
        missing_images=missing,
        without_caption=sum(image.file_name not in annotated for image in found),
    )
