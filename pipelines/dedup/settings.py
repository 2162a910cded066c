"""Settings of fingerprints, deduplication and decontamination."""

from __future__ import annotations

from pydantic import Field

from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import CaptionSettings
from pipelines.tables.settings import Bounds
from snapfusion.settings import Settings


class EvaluationSet(Settings):
    """What a model will be judged by, and so must not have seen.

    Each list, folder and set of shards goes by the last part of its URL, so no two may be called alike.

    Attributes:
        captions: caption lists (txt, tsv, csv, jsonl, Parquet).
        reading: which column of them holds the caption.
        pictures: folders or globs of pictures.
        shards: tars, folders or globs of img2dataset shards; their captions and addresses count too.
    """

    captions: tuple[str, ...] = ()
    reading: CaptionSettings = CaptionSettings()
    pictures: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """All of it."""
        return (*self.captions, *self.pictures, *self.shards)


URL, IMAGE, CAPTION = 0, 1, 2
"""Kinds of keys of which two equal ones make a copy."""


class FingerprintsSettings(Settings):
    """How FINGERPRINTS are made; which rows are usable is for the settings of LATENTS to say.

    Attributes:
        table: the place of FINGERPRINTS in the run; another where rows are selected otherwise.
        rows_per_unit: rows of one data file.
        readers: the actor pool that streams, decodes and hashes.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    table: str = Field("fingerprints", pattern=r"^[A-Za-z0-9_.-]+$")
    rows_per_unit: int = Field(10_000, ge=1)
    readers: Pool = Pool(actors=2)
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


class Deduplication(Settings):
    """What counts as a copy, and of what.

    Attributes:
        use: whether LATENTS refuse copies; `jobs.find_duplicates` must have judged their shards.
        table: the place of the verdicts in the run; another for other settings or another evaluation.
        url: whether two rows of one address are copies.
        image: whether two rows of the same bytes of a picture are.
        caption: whether two rows of one caption are, apart from case and punctuation. Off, because on the web
            many pictures of one thing have one name.
        max_hamming: in how many of 64 bits the perceptual hashes of two pictures that look alike may differ;
            null compares none. Hashes of pictures with any detail have 32 ones, so differences are even.
        against: FINGERPRINTS of other runs, by their URLs: their rows come before all of this run's.
        evaluation: what a model will be judged by. Its captions count whatever `caption` is, and its pictures
            whatever `image` is.
        fingerprints: how FINGERPRINTS are made.
        rows_at_once: how many rows a worker holds of a group of many; about 100 bytes each.
    """

    use: bool = False
    table: str = Field("duplicates", pattern=r"^[A-Za-z0-9_.-]+$")
    url: bool = True
    image: bool = True
    caption: bool = False
    max_hamming: int | None = Field(4, ge=0, le=8)
    against: tuple[str, ...] = ()
    evaluation: EvaluationSet = EvaluationSet()
    fingerprints: FingerprintsSettings = FingerprintsSettings()
    rows_at_once: int = Field(1_000_000, ge=1)

    @property
    def kinds(self) -> frozenset[int]:
        """The kinds of keys that make copies."""
        asked = {URL: self.url, IMAGE: self.image, CAPTION: self.caption}
        return frozenset(kind for kind, wanted in asked.items() if wanted)
