"""Fingerprints an evaluation set, so that training rows which duplicate it are rejected."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Unpack

from pipelines.datasets.build import BuildOptions, Pending, build_table, check_list, list_units
from pipelines.datasets.pairs import caption_units
from pipelines.datasets.settings import LatentsSettings
from pipelines.datasets.shard_plan import pending_shards
from pipelines.dedup.fingerprints import identity_of, image_bounds, read_stage
from pipelines.dedup.settings import EvaluationSet, FingerprintsSettings
from pipelines.ray_data.execution import PipelineStage
from pipelines.sources import SourceError
from pipelines.sources.captions import captions_digest, read_captions
from pipelines.sources.listing import SourceFile, list_files
from pipelines.sources.tar_samples import IMAGE_EXTENSIONS
from pipelines.sources.webdataset import list_shards
from pipelines.stages.fingerprint import FingerprintCaptions, FingerprintImages
from pipelines.stages.settings import Selection
from pipelines.stages.shard_work import ShardWork
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import FINGERPRINTS
from pipelines.tables.table import Snapshot
from pipelines.tables.units import CaptionRows, ImageNameRows
from snapfusion.settings import SettingsError

_CENTER_CROP = "middle-of-"
"""Prefix of the sources of center squares; `_source_name` gives no other source this prefix."""
_SUFFIXES = tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))


def fingerprint_evaluation(
    settings: FingerprintsSettings,
    *,
    latents: LatentsSettings,
    evaluation: EvaluationSet,
    url: str,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to a row for every caption and image of the evaluation set; returns it.

    No selection applies. An image is hashed whole and as its center square, because shards may hold either.

    Args:
        settings: of the table.
        latents: settings by which shards and images are read.
        evaluation: the captions, images and shards.
        url: of the table.
        options: see `build_table`.

    Raises:
        SettingsError: if two parts of the set have one name.
        SourceError: if a list, folder or shard does not exist.
        TableError: if the table was made with other settings, or of other captions, images or shards.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    # What a model is scored by must be excluded whatever the training selects.
    unselected = latents.model_copy(update={"selection": Selection()})
    identity = {**identity_of(settings, latents=unselected), "evaluation": describe_evaluation(evaluation)}
    images = {"images": image_bounds(latents)}
    stage = partial(PipelineStage, pool=settings.readers)
    builds: tuple[tuple[Pending, PipelineStage], ...] = (
        (partial(_captions, evaluation, settings), stage(build=FingerprintCaptions, arguments={})),
        (partial(_images, evaluation, settings), stage(build=FingerprintImages, arguments=images)),
        (
            partial(_images, evaluation, settings, prefix=_CENTER_CROP),
            stage(build=FingerprintImages, arguments={**images, "middle": True}),
        ),
        (partial(_shards, evaluation), read_stage(settings, latents=unselected)),
    )
    for pending, reader in builds:
        table = build_table(
            url,
            settings,
            schema=FINGERPRINTS,
            identity=identity,
            pending=pending,
            stages=[reader],
            # The parts are read one after the other, and their total is not known before.
            count_rows=lambda _: None,
            **options,
        )
    return table


def describe_evaluation(evaluation: EvaluationSet) -> dict[str, Any]:
    """The names of its parts, by kind; each unit records their content.

    Raises:
        SettingsError: if two parts have one name.
    """
    names = Counter(map(_source_name, evaluation.urls))
    duplicates = [name for name, count in names.items() if count > 1]
    if duplicates:
        raise SettingsError(
            f"two parts of the evaluation are called {duplicates[0]!r}, after the last part of their URLs; "
            "rename one"
        )
    kinds = {"captions": evaluation.captions, "pictures": evaluation.images, "shards": evaluation.shards}
    return {kind: sorted(map(_source_name, urls)) for kind, urls in kinds.items()}


def _source_name(url: str) -> str:
    """The last part of a URL that is no glob pattern, as a file name."""
    parts = [part for part in url.rstrip("/").split("/") if not re.search(r"[*?\[]", part)]
    return "evaluation-" + re.sub(r"[^A-Za-z0-9_.-]", "_", parts[-1] if parts else url)


def _captions(
    evaluation: EvaluationSet, settings: FingerprintsSettings, manifests: Sequence[UnitManifest]
) -> Iterator[CaptionRows]:
    for url in evaluation.captions:
        rows = list(read_captions(url, evaluation.reading))
        check_list(rows, manifests, sources=[_source_name(url)], digest=captions_digest)
        for unit, captions, rejections in caption_units(
            rows, manifests, source=_source_name(url), rows_per_unit=settings.rows_per_unit
        ):
            yield CaptionRows(unit=unit, draw=0, captions=captions, rejections=rejections)


def _shards(evaluation: EvaluationSet, manifests: Sequence[UnitManifest]) -> Iterator[ShardWork]:
    for url in evaluation.shards:
        yield from pending_shards(list_shards(url), manifests, source=_source_name(url))


def _images(
    evaluation: EvaluationSet,
    settings: FingerprintsSettings,
    manifests: Sequence[UnitManifest],
    *,
    prefix: str = "",
) -> Iterator[ImageNameRows]:
    for url in evaluation.images:
        files = list_files(url, endings=_SUFFIXES)
        if not files:
            raise SourceError(f"no images at {url}: give a folder of them, or a glob such as 'folder/*.jpg'")
        source = prefix + _source_name(url)
        check_list(files, manifests, sources=[source], digest=_files_digest)
        for unit, part in list_units(
            files,
            manifests,
            source=source,
            rows_per_unit=settings.rows_per_unit,
            digest=_files_digest,
        ):
            yield ImageNameRows(unit=unit, names=[file.url for file in part])


def _files_digest(files: Sequence[SourceFile]) -> str:
    record = json.dumps([(file.file_name, file.size) for file in files])
    return hashlib.sha256(record.encode()).hexdigest()
