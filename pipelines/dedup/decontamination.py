"""What a model will be judged by, as FINGERPRINTS of its own: rows of a training that copy it are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.datasets.latents import pending_shards
from pipelines.datasets.pairs import caption_units
from pipelines.datasets.settings import LatentsSettings
from pipelines.dedup.fingerprints import identity_of, image_bounds, read_stage, write_stage
from pipelines.dedup.settings import EvaluationSet, FingerprintsSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, read_captions
from pipelines.sources.listing import SourceFile, list_files
from pipelines.sources.webdataset import IMAGE_EXTENSIONS, list_shards
from pipelines.stages.fingerprint import FingerprintCaptions, FingerprintImages
from pipelines.stages.read import ShardWork
from pipelines.stages.settings import Selection
from pipelines.tables.commits import Origin
from pipelines.tables.committer import commit_stream, recover
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import FINGERPRINTS
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import CaptionRows, ImageNameRows, Unit, committed_ranges, uncovered_ranges
from snapfusion.settings import SettingsError

_CENTER_CROP = "middle-of-"
"""Begins the name of a source of middle squares; those of places begin otherwise."""
_ENDINGS = tuple(f".{ending}" for ending in sorted(IMAGE_EXTENSIONS))


def fingerprint_evaluation(
    settings: FingerprintsSettings,
    *,
    latents: LatentsSettings,
    evaluation: EvaluationSet,
    url: str,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
) -> Snapshot:
    """Bring the table at `url` to a row for every caption and picture of the evaluation; returns it.

    Nothing is selected: what a model is judged by counts. A picture is looked at whole and as its middle
    square, because shards may hold either.

    Args:
        settings: how.
        latents: how shards and pictures are read.
        evaluation: the captions and pictures.
        url: of the table.
        origin: who makes the new units, and from what.
        run: what sends pictures through the stages.

    Raises:
        SettingsError: if two of its places go by one name.
        SourceError: if a list, folder or shard is not there.
        TableError: if the table was made with other settings, or of other captions, pictures or shards.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    plain = latents.model_copy(update={"selection": Selection()})
    identity = identity_of(settings, latents=plain)
    table = create_table(
        url, schema=FINGERPRINTS, identity={**identity, "evaluation": describe_evaluation(evaluation)}
    )
    table = recover(table, origin=origin)
    known = list(table.manifests().values())
    pictures = {"images": image_bounds(latents)}
    works: tuple[tuple[list[Any], PipelineStage], ...] = (
        (
            list(_captions(evaluation, settings, known)),
            PipelineStage(build=FingerprintCaptions, arguments={}, pool=settings.readers),
        ),
        (
            list(_images(evaluation, settings, known)),
            PipelineStage(build=FingerprintImages, arguments=pictures, pool=settings.readers),
        ),
        (
            list(_images(evaluation, settings, known, prefix=_CENTER_CROP)),
            PipelineStage(
                build=FingerprintImages, arguments={**pictures, "middle": True}, pool=settings.readers
            ),
        ),
        (list(_shards(evaluation, known)), read_stage(settings, latents=plain)),
    )
    for items, stage in works:
        finished = run(items, [stage, write_stage(table, settings)])
        table = commit_stream(table, finished, bounds=settings.bounds, total=None, origin=origin)
    return table


def describe_evaluation(evaluation: EvaluationSet) -> dict[str, Any]:
    """The names of its places, by kind; what they hold is stated by each unit.

    Raises:
        SettingsError: if two of them go by one name.
    """
    names = Counter(_source_name(place) for place in evaluation.places)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise SettingsError(
            f"two parts of the evaluation are called {twice[0]!r}, the last part of their URLs; rename one"
        )
    kinds = {"captions": evaluation.captions, "pictures": evaluation.pictures, "shards": evaluation.shards}
    return {kind: sorted(map(_source_name, places)) for kind, places in kinds.items()}


def _source_name(place: str) -> str:
    """Of a list, folder or glob: the last part of its URL that says something, fit for a file's name."""
    parts = [part for part in place.rstrip("/").split("/") if not re.search(r"[*?\[]", part)]
    return "evaluation-" + re.sub(r"[^A-Za-z0-9_.-]", "_", parts[-1] if parts else place)


def _captions(
    evaluation: EvaluationSet, settings: FingerprintsSettings, known: Sequence[UnitManifest]
) -> Iterator[CaptionRows]:
    for place in evaluation.captions:
        listed = list(read_captions(place, evaluation.reading))
        units = caption_units(
            listed, name=_source_name(place), accounts=known, rows_per_unit=settings.rows_per_unit
        )
        for unit, rows in units:
            yield CaptionRows(
                unit=unit,
                draw=0,
                captions=[row for row in rows if isinstance(row, Caption)],
                rejections=[row for row in rows if isinstance(row, Rejection)],
            )


def _shards(evaluation: EvaluationSet, known: Sequence[UnitManifest]) -> Iterator[ShardWork]:
    for place in evaluation.shards:
        yield from pending_shards(list_shards(place), source=_source_name(place), accounts=known)


def _images(
    evaluation: EvaluationSet,
    settings: FingerprintsSettings,
    known: Sequence[UnitManifest],
    *,
    prefix: str = "",
) -> Iterator[ImageNameRows]:
    for place in evaluation.pictures:
        found = list_files(place, endings=_ENDINGS)
        if not found:
            raise SourceError(
                f"no pictures at {place}: give a folder of them, or a glob such as 'folder/*.jpg'"
            )
        name = prefix + _source_name(place)
        yield from _units(found, name, settings, [one for one in known if one.source == name])


def _units(
    found: Sequence[SourceFile], name: str, settings: FingerprintsSettings, known: Sequence[UnitManifest]
) -> Iterator[ImageNameRows]:
    for account in known:
        if account.source_digest != _digest(found[account.start : account.stop]):
            raise TableError(
                f"unit {account.unit} was made of other pictures than {account.start} .. {account.stop} of "
                f"those that {name} has now; give a new table"
            )
    for gap in uncovered_ranges(
        len(found), committed=committed_ranges(known, name), rows_per_unit=settings.rows_per_unit
    ):
        places = found[gap.start : gap.stop]
        unit = Unit(
            name=f"{name}-{gap.start:09d}-{gap.stop:09d}",
            source=name,
            start=gap.start,
            stop=gap.stop,
            final=gap.final,
            source_digest=_digest(places),
        )
        yield ImageNameRows(unit=unit, names=[place.url for place in places])


def _digest(places: Sequence[SourceFile]) -> str:
    told = json.dumps([(place.file_name, place.size) for place in places])
    return hashlib.sha256(told.encode()).hexdigest()
