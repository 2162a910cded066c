"""PAIRS: the latents and images that the teacher generates for captions. SnapFusion Sec. 3.2 and B.2.

captions ─ units of (caption range, draw) ─ teacher, many DDIM steps ─ data file ─ commit
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import pyarrow as pa

from pipelines.datasets.build import (
    BuildOptions,
    Identity,
    LazyItems,
    build_table,
    check_list,
    list_units,
    model_stage,
)
from pipelines.datasets.recompute import check_same, device_of, packed
from pipelines.datasets.settings import PairsSettings
from pipelines.rejections import Rejected, Rejection
from pipelines.sources.captions import Caption, CaptionRow, captions_digest
from pipelines.stages.crop import check_size
from pipelines.stages.generate import GeneratePairs
from pipelines.stages.settings import Generation
from pipelines.storage.objects import read_bytes
from pipelines.tables.deletion_list import DeletionKeys, redacted_id
from pipelines.tables.manifest import UnitManifest, read_manifest
from pipelines.tables.schemas import pairs_schema
from pipelines.tables.table import Snapshot
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.units import CaptionRows, FinishedRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load


def identity_of(settings: PairsSettings, *, model: Identity) -> Identity:
    """Everything that determines the rows of PAIRS but the captions, which each unit records."""
    return {
        "kind": "pairs",
        "model": model,
        "generation": settings.generation.identity(),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": settings.device.dtype,
    }


def generate_pairs(
    settings: PairsSettings,
    *,
    teacher: str,
    captions: Sequence[CaptionRow],
    source: str,
    url: str,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to `settings.draws` draws of every caption; returns its newest version.

    Args:
        settings: of the table.
        teacher: a source that `snapfusion.models.load` accepts.
        captions: in order, as `list_captions` gives them; the list may have grown at its end.
        source: a short name of the list; prefix of the names of units.
        url: of the table.
        options: see `build_table`.

    Raises:
        TableError: if the table was made with other settings, another teacher or other captions.
        SettingsError: if the teacher cannot generate images of that size.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    bundle = load(teacher)
    schema = _schema(settings.generation, bundle=bundle)
    identity = identity_of(settings, model=bundle.describe())
    del bundle  # workers beside this process need the memory
    arguments = {"model": teacher, "settings": settings.generation, "device": settings.device}
    stages = [model_stage(GeneratePairs, arguments, pool=settings.teachers, schema=schema)]
    pending = partial(lazy_units, settings, captions=captions, source=source)
    return build_table(
        url, settings, schema=schema, identity=identity, pending=pending, stages=stages, **options
    )


def lazy_units(
    settings: PairsSettings, manifests: Sequence[UnitManifest], *, captions: Sequence[CaptionRow], source: str
) -> LazyItems:
    """The units that are not committed, planned when they are due; see `pending_units`."""
    sources = set(_sources(settings, source))
    committed = sum(manifest.stop - manifest.start for manifest in manifests if manifest.source in sources)
    plan = partial(pending_units, settings, manifests, captions=captions, source=source)
    return LazyItems(plan=plan, rows=settings.draws * len(captions) - committed)


def _sources(settings: PairsSettings, source: str) -> list[str]:
    # The draw is part of a unit's name and of no other unit, so that more draws only add units.
    return [f"{source}-d{draw:04d}" for draw in range(settings.draws)]


def pending_units(
    settings: PairsSettings, manifests: Sequence[UnitManifest], *, captions: Sequence[CaptionRow], source: str
) -> Iterator[CaptionRows]:
    """The units that are not committed, draw by draw.

    Raises:
        TableError: if a committed unit was made from other captions than those given.
    """
    sources = _sources(settings, source)
    check_list(captions, manifests, sources=sources, digest=captions_digest)
    for draw, name in enumerate(sources):
        for unit, accepted, rejections in caption_units(
            captions, manifests, source=name, rows_per_unit=settings.rows_per_unit
        ):
            renamed = [replace(row, id=f"{row.id}#{draw}", source=unit.source) for row in rejections]
            yield CaptionRows(unit=unit, draw=draw, captions=accepted, rejections=renamed)


def caption_units(
    captions: Sequence[CaptionRow], manifests: Sequence[UnitManifest], *, source: str, rows_per_unit: int
) -> Iterator[tuple[Unit, list[Caption], list[Rejection]]]:
    """The units of a caption list that are not committed, each with its captions and rejected rows."""
    for unit, rows in list_units(
        captions, manifests, source=source, rows_per_unit=rows_per_unit, digest=captions_digest
    ):
        accepted = [row for row in rows if isinstance(row, Caption)]
        yield unit, accepted, [row for row in rows if isinstance(row, Rejection)]


def captions_of(table: Snapshot, *, limit: int | None = None) -> list[CaptionRow]:
    """The captions of LATENTS in order of its units, under the ids of their rows.

    A deleted row stays as a rejection, so that all others keep their ordinals.
    """
    rows = itertools.chain.from_iterable(_unit_captions(table, unit) for unit in table.units)
    return [replace(row, ordinal=ordinal) for ordinal, row in enumerate(itertools.islice(rows, limit))]


def _unit_captions(table: Snapshot, unit: UnitFile) -> list[CaptionRow]:
    rows = table.read_unit(unit, ["id", "caption"])
    # Only a file that was rewritten by a deletion lacks rows of its manifest.
    if not unit.revision:
        return [*captions_in(rows, range(rows.num_rows), id_column="id")]
    manifest = read_manifest(read_bytes(unit.path))
    captions = captions_in(rows, manifest.ordinals(), id_column="id")
    deleted = [_withheld(row.id, row.ordinal) for row in manifest.rejections if row.reason == "forgotten"]
    return sorted([*captions, *deleted], key=lambda caption: caption.ordinal)


def captions_in(rows: pa.Table, ordinals: Iterable[int], *, id_column: str = "source_id") -> list[Caption]:
    """The captions of a table's rows under their ids in `id_column` and under these ordinals."""
    values = zip(rows[id_column].to_pylist(), ordinals, rows["caption"].to_pylist(), strict=True)
    return [Caption(id=id_, ordinal=ordinal, text=text) for id_, ordinal, text in values]


def withhold_deleted(captions: Iterable[CaptionRow], deleted: DeletionKeys) -> list[CaptionRow]:
    """The list with deleted captions rejected in place, and without their ids."""
    return [withhold_if_deleted(deleted, row) for row in captions]


def withhold_if_deleted(deleted: DeletionKeys, row: CaptionRow) -> CaptionRow:
    """The row, or if it is deleted a rejection in its place, without its id."""
    if not deleted.has_id(row.id):
        return row
    id_ = redacted_id(row.id)
    return _withheld(id_, row.ordinal) if isinstance(row, Caption) else replace(row, id=id_, detail="")


def _withheld(id_: str, ordinal: int) -> Rejection:
    return Rejected("withheld").record(id=id_, source="", ordinal=ordinal)


def recomputer(table: Snapshot, *, teacher: str) -> Recompute:
    """Recomputes units of PAIRS for `verify_table`, from the keys and captions in their rows.

    Raises:
        TableError: if `teacher` is not the one that the table was made with.
    """
    generation = Generation.parse(table.identity["generation"])
    bundle = load(teacher)
    check_same(table, {"model": bundle.describe()}, "teacher")

    def recompute(manifest: UnitManifest, rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        if {"not_finite", "crashed"} & manifest.rejected().keys():
            raise CannotRecompute("rows that the teacher failed on are not in it, and batches depend on them")
        captions = captions_in(rows, manifest.ordinals())
        # Any text does for deleted rows: bits depend on a row's position in the batch, not on the other rows.
        captions += [
            Caption(id=rejection.id.rpartition("#")[0], ordinal=rejection.ordinal, text="")
            for rejection in manifest.rejections
            if rejection.reason == "forgotten"
        ]
        captions.sort(key=lambda caption: caption.ordinal)
        draw = int(rows["draw"][0].as_py()) if rows.num_rows else 0
        stage = GeneratePairs(model=teacher, settings=generation, device=device_of(table, manifest))
        return stage(CaptionRows(unit=Unit.of(manifest), draw=draw, captions=captions))

    return packed(_schema(generation, bundle=bundle), recompute)


def _schema(generation: Generation, *, bundle: Bundle) -> pa.Schema:
    size = generation.size or bundle.image_size
    check_size(size, step=bundle.granularity, option="pairs.generation.size")
    shape = (bundle.latent_shape[0], size // bundle.cell, size // bundle.cell)
    return pairs_schema(latent_shape=shape, num_tokens=bundle.tokenizer.model_max_length)
