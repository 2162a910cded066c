"""Settings of fingerprints, deduplication and decontamination."""

from pydantic import Field

from pipelines.datasets.settings import BuildSettings
from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import CaptionSettings
from snapfusion.settings import FOLDER_NAME, Settings

URL, IMAGE, CAPTION = 0, 1, 2
"""Kinds of exact keys: rows with one key of a kind may be duplicates."""


class EvaluationSet(Settings):
    """The evaluation set that training data must not contain.

    Each list, folder and set of shards is named by the last part of its URL, so these must differ.

    Attributes:
        captions: caption lists (txt, tsv, csv, jsonl, json, Parquet).
        reading: columns of the caption lists.
        images: folders or globs of images.
        shards: tars, folders or globs of img2dataset shards; their captions and URLs count too.
    """

    captions: tuple[str, ...] = ()
    reading: CaptionSettings = CaptionSettings()
    images: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of all its parts."""
        return (*self.captions, *self.images, *self.shards)


class FingerprintsSettings(BuildSettings):
    """Settings of FINGERPRINTS; the settings of LATENTS decide which rows are usable.

    Attributes:
        table: name of the table in the run; give another one for another selection.
        rows_per_unit: rows of one data file.
        readers: the actor pool that streams, decodes and hashes.
    """

    table: str = Field("fingerprints", pattern=FOLDER_NAME)
    rows_per_unit: int = Field(10_000, ge=1)
    readers: Pool = Pool(actors=2)


class Deduplication(Settings):
    """Settings of deduplication: what counts as a duplicate, and of which rows.

    Attributes:
        use: whether LATENTS reject duplicates; `jobs.find_duplicates` must have run on their shards.
        table: name of the table of verdicts in the run; give another one for other settings or another
            evaluation.
        url: whether rows with one URL are duplicates.
        image: whether rows with the same bytes of an image are.
        caption: whether rows with one caption are, apart from case and punctuation. Off, because on the web
            many images of one thing have one caption.
        max_hamming: in how many of 64 bits the perceptual hashes of near-duplicate images may differ; null
            compares none. Hashes of images with any detail have 32 ones, so differences are even.
        against: URLs of FINGERPRINTS of other runs, whose rows precede all rows of this run.
        evaluation: the evaluation set. Its captions count whatever `caption` is, and its images whatever
            `image` is.
        fingerprints: of FINGERPRINTS.
        rows_at_once: rows of a large group that a worker holds in memory; about 100 bytes each.
    """

    use: bool = False
    table: str = Field("duplicates", pattern=FOLDER_NAME)
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
        """The kinds of keys that make duplicates."""
        used = {URL: self.url, IMAGE: self.image, CAPTION: self.caption}
        return frozenset(kind for kind, is_used in used.items() if is_used)
