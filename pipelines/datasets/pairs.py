"""PAIRS: what the teacher draws for each caption. SnapFusion Sec. 3.2 and B.2.

captions ─ units of (caption range, draw) ─ teacher, many DDIM steps ─ data file ─ commit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipelines.datasets.settings import PairsSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.rejections import Rejected, Rejection
from pipelines.sources.captions import Caption, captions_digest
from pipelines.stages.crop import check_size
from pipelines.stages.generate import GeneratePairs
from pipelines.stages.settings import Device, Generation
from pipelines.stages.write import WriteUnit, pack
from pipelines.storage.objects import read_bytes
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover, take_rows
from pipelines.tables.deletion_list import DeletionKeys, redacted_id
from pipelines.tables.manifest import UnitManifest, read_manifest
from pipelines.tables.schemas import pairs_schema
from pipelines.tables.table import Snapshot, TableError, UnitFile, create_table
from pipelines.tables.units import CaptionRows, FinishedRows, Unit, committed_ranges, uncovered_ranges
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.settings import digest

_UNIT_FIELDS = ("source", "start", "stop", "final", "source_digest")


def identity_of(settings: PairsSettings, *, model: dict[str, Any]) -> dict[str, Any]:
    """Everything that determines the rows of PAIRS, the captions apart (each unit states its own)."""
    return {
        "kind": "pairs",
        "model": model,
        "generation": settings.generation.to_values(),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": settings.device.dtype,
    }


def generate_pairs(
    settings: PairsSettings,
    *,
    teacher: str,
    captions: Sequence[Caption | Rejection],
    source: str,
    url: str,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to `settings.draws` draws of every caption; returns its newest version.

    Args:
        settings: how.
        teacher: a source that `snapfusion.models.load` accepts.
        captions: in order, as `read_captions` gives them; a list that grew at its end is gone on with.
        source: a short name of the list; units are named after it.
        url: of the table.
        origin: who makes the new units, and from what; kept beside their accounts.
        run: what sends units through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings, another teacher or other captions.
        SettingsError: if the teacher cannot draw pictures of that size.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    bundle = load(teacher)
    schema = _schema(settings.generation, bundle=bundle)
    identity = identity_of(settings, model=bundle.describe())
    del bundle  # workers beside this process need the memory
    table = create_table(url, schema=schema, identity=identity)
    table = recover(table, origin=origin)
    waiting = pending_units(settings, captions=captions, source=source, accounts=table.manifests().values())
    items = take_rows(waiting, bounds=settings.bounds, rows=lambda item: item.unit.rows_read)
    stages = [
        PipelineStage(
            build=GeneratePairs,
            arguments={"teacher": teacher, "settings": settings.generation, "device": settings.device},
            pool=settings.teachers,
            give_up=set_aside,
        ),
        PipelineStage(
            build=WriteUnit,
            arguments={"url": table.url, "schema": schema, "settings": digest(table.identity)},
            pool=settings.writers,
        ),
    ]
    total = sum(item.unit.rows_read for item in items)
    return commit_stream(
        table,
        run(items, stages),
        bounds=settings.bounds,
        total=total,
        origin=origin,
        on_progress=on_progress,
    )


def pending_units(
    settings: PairsSettings,
    *,
    captions: Sequence[Caption | Rejection],
    source: str,
    accounts: Iterable[UnitManifest],
) -> Iterator[CaptionRows]:
    """The units that no committed one covers, draw by draw.

    Raises:
        TableError: if a committed unit was drawn from other captions than those given.
    """
    known = list(accounts)
    for draw in range(settings.draws):
        name = f"{source}-d{draw:04d}"
        for unit, rows in caption_units(
            captions, name=name, accounts=known, rows_per_unit=settings.rows_per_unit
        ):
            yield CaptionRows(
                unit=unit,
                draw=draw,
                captions=[row for row in rows if isinstance(row, Caption)],
                rejections=[
                    replace(row, id=f"{row.id}#{draw}", source=name)
                    for row in rows
                    if isinstance(row, Rejection)
                ],
            )


def caption_units(
    captions: Sequence[Caption | Rejection],
    *,
    name: str,
    accounts: Sequence[UnitManifest],
    rows_per_unit: int,
) -> Iterator[tuple[Unit, Sequence[Caption | Rejection]]]:
    """The units of source `name` that no committed one covers, each with its rows of the list.

    Raises:
        TableError: if a committed unit was drawn from other captions than those given.
    """
    for account in accounts:
        if account.source == name:
            _check_captions(account, captions)
    for gap in uncovered_ranges(
        len(captions), committed=committed_ranges(accounts, name), rows_per_unit=rows_per_unit
    ):
        rows = captions[gap.start : gap.stop]
        unit = Unit(
            name=f"{name}-{gap.start:09d}-{gap.stop:09d}",
            source=name,
            start=gap.start,
            stop=gap.stop,
            final=gap.final,
            source_digest=captions_digest(rows),
        )
        yield unit, rows


def captions_of(table: Snapshot, *, limit: int | None = None) -> list[Caption | Rejection]:
    """The captions of LATENTS in order of its units, under the ids of their rows.

    A row that was forgotten keeps its place, so that all others keep theirs.
    """
    captions: list[Caption | Rejection] = []
    for unit in table.units:
        for row in _captions_in(table, unit):
            if len(captions) == limit:
                return captions
            captions.append(replace(row, ordinal=len(captions)))
    return captions


def _captions_in(table: Snapshot, unit: UnitFile) -> list[Caption | Rejection]:
    told = table.read_unit(unit, ["id", "caption"]).to_pylist()
    places, gone = list(range(len(told))), []
    if unit.revision:
        account = read_manifest(read_bytes(unit.path))
        gone = [rejection for rejection in account.rejections if rejection.reason == "forgotten"]
        places = account.ordinals()
    rows: list[Caption | Rejection] = [
        *(Caption(id=row["id"], ordinal=n, text=row["caption"]) for n, row in zip(places, told, strict=True)),
        *(_withheld(rejection.id, ordinal=rejection.ordinal) for rejection in gone),
    ]
    return sorted(rows, key=lambda row: row.ordinal)


def withhold_deleted(
    captions: Iterable[Caption | Rejection], forgotten: DeletionKeys
) -> list[Caption | Rejection]:
    """The list with what is forgotten set aside where it stands, and without its ids."""

    def row_of(row: Caption | Rejection) -> Caption | Rejection:
        if not forgotten.has_id(row.id):
            return row
        if isinstance(row, Caption):
            return _withheld(redacted_id(row.id), ordinal=row.ordinal)
        return replace(row, id=redacted_id(row.id), detail="")

    return [row_of(row) for row in captions]


def _withheld(id_: str, *, ordinal: int) -> Rejection:
    return Rejected("withheld").record(id=id_, source="", ordinal=ordinal)


def recomputer(table: Snapshot, *, teacher: str) -> Recompute:
    """What `verify_table` needs to make units of PAIRS again, from the keys and captions in their rows.

    Raises:
        TableError: if `teacher` is not the one that the table was made with.
    """
    generation = Generation.parse(table.identity["generation"])
    bundle = load(teacher)
    if table.identity["model"] != bundle.describe():
        raise TableError(f"{table.url} was made with another teacher than {teacher!r}; name the one it was")
    schema = _schema(generation, bundle=bundle)

    def make(account: UnitManifest, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if {"not_finite", "crashed"} & account.rejected().keys():
            raise CannotRecompute("rows that the teacher lost are not in it, and batches depend on them")
        told = rows.select(["source_id", "caption"]).to_pylist()
        captions = [
            *(
                Caption(id=row["source_id"], ordinal=place, text=row["caption"])
                for place, row in zip(account.ordinals(), told, strict=True)
            ),
            # What was forgotten stood in a batch: another caption, whichever, leaves the others as they were.
            *(
                Caption(id=rejection.id.rpartition("#")[0], ordinal=rejection.ordinal, text="")
                for rejection in account.rejections
                if rejection.reason == "forgotten"
            ),
        ]
        unit = Unit(**{name: getattr(account, name) for name in _UNIT_FIELDS}, name=account.unit)
        device = Device(dtype=table.identity["dtype"], threads=account.environment["threads"])
        stage = GeneratePairs(teacher=teacher, settings=generation, device=device)
        captions.sort(key=lambda caption: caption.ordinal)
        draw = int(rows["draw"][0].as_py()) if told else 0
        finished = stage(CaptionRows(unit=unit, draw=draw, captions=captions, rejections=[]))
        return pack(finished, schema), finished.environment

    return make


def set_aside(rows: CaptionRows) -> FinishedRows:
    """A unit that took down every worker that tried it: all its rows rejected, none lost from the account."""
    crashed = [
        Rejected("crashed", "the teacher's worker died at every try").record(
            id=f"{caption.id}#{rows.draw}", source=rows.unit.source, ordinal=caption.ordinal
        )
        for caption in rows.captions
    ]
    names = ("id", "source_id", "caption", "token_ids", "noise_key", "draw", "latent", "image")
    return FinishedRows(
        unit=rows.unit, columns={name: [] for name in names}, rejections=[*rows.rejections, *crashed]
    )


def _schema(generation: Generation, *, bundle: Bundle) -> pa.Schema:
    size = generation.size or bundle.image_size
    check_size(size, step=bundle.granularity, option="pairs.generation.size")
    return pairs_schema(
        latent_shape=(bundle.latent_shape[0], size // bundle.cell, size // bundle.cell),
        num_tokens=bundle.tokenizer.model_max_length,
    )


def _check_captions(account: UnitManifest, captions: Sequence[Caption | Rejection]) -> None:
    if captions_digest(captions[account.start : account.stop]) != account.source_digest:
        raise TableError(
            f"unit {account.unit} was drawn from other captions than rows {account.start} .. {account.stop} "
            "of the list given; give the same list (it may grow at its end), or a new table"
        )
