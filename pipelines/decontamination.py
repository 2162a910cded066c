"""What a model will be judged by, as FINGERPRINTS of its own: rows of a training that copy it are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.account import Account
from pipelines.commits import Origin
from pipelines.execution import Runner, Stage, on_ray
from pipelines.fingerprints import Fingerprints, identity_of, picture_bounds, reading, writing
from pipelines.intake import recover, take_in
from pipelines.latents import Latents, plan
from pipelines.pairs import caption_units
from pipelines.rejection import Rejection
from pipelines.schemas import FINGERPRINTS
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, CaptionSettings, read_captions
from pipelines.sources.listing import Place, list_files
from pipelines.sources.webdataset import IMAGE_EXTENSIONS, list_shards
from pipelines.stages.fingerprint import FingerprintCaptions, FingerprintPictures
from pipelines.stages.read import ShardWork
from pipelines.stages.select import Selection
from pipelines.tables import Snapshot, TableError, accounts, create_table, open_table
from pipelines.units import CaptionRows, PictureRows, Unit, gaps, intervals
from snapfusion.settings import Settings, SettingsError

_MIDDLE = "middle-of-"
"""Begins the name of a source of middle squares; those of places begin otherwise."""
_ENDINGS = tuple(f".{ending}" for ending in sorted(IMAGE_EXTENSIONS))


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


def fingerprint_evaluation(
    settings: Fingerprints,
    *,
    latents: Latents,
    evaluation: EvaluationSet,
    url: str,
    origin: Origin | None = None,
    run: Runner = on_ray,
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
    table = create_table(url, schema=FINGERPRINTS, identity={**identity, "evaluation": describe(evaluation)})
    recover(url, origin=origin)
    known = list(accounts(url).values())
    pictures = {"images": picture_bounds(latents)}
    works: tuple[tuple[list[Any], Stage], ...] = (
        (
            list(_captions(evaluation, settings, known)),
            Stage(build=FingerprintCaptions, arguments={}, pool=settings.readers),
        ),
        (
            list(_pictures(evaluation, settings, known)),
            Stage(build=FingerprintPictures, arguments=pictures, pool=settings.readers),
        ),
        (
            list(_pictures(evaluation, settings, known, prefix=_MIDDLE)),
            Stage(build=FingerprintPictures, arguments={**pictures, "middle": True}, pool=settings.readers),
        ),
        (list(_shards(evaluation, known)), reading(settings, latents=plain)),
    )
    for items, stage in works:
        finished = run(items, [stage, writing(table, settings)])
        take_in(url, finished, bounds=settings.bounds, total=None, origin=origin)
    return open_table(url)


def describe(evaluation: EvaluationSet) -> dict[str, Any]:
    """The names of its places, by kind; what they hold is stated by each unit.

    Raises:
        SettingsError: if two of them go by one name.
    """
    names = Counter(_name(place) for place in evaluation.places)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise SettingsError(
            f"two parts of the evaluation are called {twice[0]!r}, the last part of their URLs; rename one"
        )
    kinds = {"captions": evaluation.captions, "pictures": evaluation.pictures, "shards": evaluation.shards}
    return {kind: sorted(map(_name, places)) for kind, places in kinds.items()}


def _name(place: str) -> str:
    """Of a list, folder or glob: the last part of its URL that says something, fit for a file's name."""
    parts = [part for part in place.rstrip("/").split("/") if not re.search(r"[*?\[]", part)]
    return "evaluation-" + re.sub(r"[^A-Za-z0-9_.-]", "_", parts[-1] if parts else place)


def _captions(
    evaluation: EvaluationSet, settings: Fingerprints, known: Sequence[Account]
) -> Iterator[CaptionRows]:
    for place in evaluation.captions:
        listed = list(read_captions(place, evaluation.reading))
        units = caption_units(listed, name=_name(place), accounts=known, rows_per_unit=settings.rows_per_unit)
        for unit, rows in units:
            yield CaptionRows(
                unit=unit,
                draw=0,
                captions=[row for row in rows if isinstance(row, Caption)],
                rejections=[row for row in rows if isinstance(row, Rejection)],
            )


def _shards(evaluation: EvaluationSet, known: Sequence[Account]) -> Iterator[ShardWork]:
    for place in evaluation.shards:
        yield from plan(list_shards(place), source=_name(place), accounts=known)


def _pictures(
    evaluation: EvaluationSet, settings: Fingerprints, known: Sequence[Account], *, prefix: str = ""
) -> Iterator[PictureRows]:
    for place in evaluation.pictures:
        found = list_files(place, endings=_ENDINGS)
        if not found:
            raise SourceError(
                f"no pictures at {place}: give a folder of them, or a glob such as 'folder/*.jpg'"
            )
        name = prefix + _name(place)
        yield from _units(found, name, settings, [one for one in known if one.source == name])


def _units(
    found: Sequence[Place], name: str, settings: Fingerprints, known: Sequence[Account]
) -> Iterator[PictureRows]:
    for account in known:
        if account.source_digest != _digest(found[account.start : account.stop]):
            raise TableError(
                f"unit {account.unit} was made of other pictures than {account.start} .. {account.stop} of "
                f"those that {name} has now; give a new table"
            )
    for gap in gaps(len(found), committed=intervals(known, name), rows_per_unit=settings.rows_per_unit):
        places = found[gap.start : gap.stop]
        unit = Unit(
            name=f"{name}-{gap.start:09d}-{gap.stop:09d}",
            source=name,
            start=gap.start,
            stop=gap.stop,
            final=gap.final,
            source_digest=_digest(places),
        )
        yield PictureRows(unit=unit, names=[place.url for place in places])


def _digest(places: Sequence[Place]) -> str:
    told = json.dumps([(place.name, place.size) for place in places])
    return hashlib.sha256(told.encode()).hexdigest()
