"""SAMPLES: what a model draws of each caption at each guidance, as the judges see it. SnapFusion Sec. 5.

captions ─ units of (caption range, guidance) ─ model and solver ─ judges ─ data file ─ commit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.datasets.pairs import caption_units
from pipelines.datasets.settings import SamplesSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption
from pipelines.stages.crop import check_size
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Device, Sampler
from pipelines.stages.write import WriteUnit, pack
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import array_type, samples_schema
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import PromptRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.decoder import load_decoder
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.load import load
from snapfusion.settings import SettingsError, differences, digest

Cuts = Mapping[str, tuple[str, ...]]
"""What a UNet goes without: names of blocks, by a short name of the whole."""

_SIZE = "samples.drawing.size"
_UNIT_FIELDS = ("source", "start", "stop", "final", "source_digest")


def identity_of(
    settings: SamplesSettings,
    *,
    sampler: Sampler,
    bundle: Bundle,
    cuts: Cuts | None = None,
    decoder: str | None = None,
) -> dict[str, Any]:
    """Everything that determines the rows of SAMPLES, captions and guidance apart (each unit has its own)."""
    cut = {"cuts": {name: list(blocks) for name, blocks in cuts.items()}} if cuts else {}
    other = {} if decoder is None else {"decoder": weight_hash(load_decoder(decoder))}
    return {
        **cut,
        **other,
        "kind": "samples",
        "model": bundle.describe(),
        "told_w": has_guidance_embedding(bundle.unet),
        "sampler": sampler.to_values(),
        "drawing": settings.drawing.to_values(),
        "features": settings.judging.describe_features(),
        "scorer": settings.judging.describe_scorer(),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": settings.device.dtype,
    }


def generate_samples(  # noqa: PLR0913 - what, by whom, of what, where to; all by name
    settings: SamplesSettings,
    *,
    model: str,
    sampler: Sampler,
    guidance: Sequence[float],
    captions: Sequence[Caption | Rejection],
    source: str,
    url: str,
    cuts: Cuts | None = None,
    decoder: str | None = None,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to all captions at every guidance; returns its newest version.

    A guidance or caption that is added later adds units, and changes none.

    Args:
        settings: how.
        model: a source that `snapfusion.models.load` accepts.
        sampler: solver and steps.
        guidance: scales w, each at least 1.
        captions: in order; a list that grew at its end is gone on with.
        source: a short name of the list; units are named after it and the guidance.
        url: of the table.
        cuts: which blocks the UNet goes without, in turn, after it was whole; None for the whole UNet alone.
        decoder: the folder of a half-width decoder; None takes the model's own.
        origin: who makes the new units, and from what.
        run: what sends units through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings, another model or other captions.
        SettingsError: if the model cannot draw pictures of that size, or the judges not look at them.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    schema = samples_schema(
        features=settings.judging.feature_count, attributes=settings.judging.attribute_count
    )
    bundle = load(model)
    _check_size(settings, bundle=bundle)
    identity = identity_of(settings, sampler=sampler, bundle=bundle, cuts=cuts, decoder=decoder)
    del bundle  # workers beside this process need the memory
    table = create_table(url, schema=schema, identity=identity)
    table = recover(table, origin=origin)
    known = table.manifests().values()
    items = list(
        pending_units(
            settings, guidance=guidance, captions=captions, source=source, accounts=known, cuts=cuts
        )
    )
    arguments = {
        "model": model,
        "sampler": sampler,
        "drawing": settings.drawing,
        "judging": settings.judging,
        "device": settings.device,
        "decoder": decoder,
    }
    written = {"url": table.url, "schema": schema, "settings": digest(table.identity)}
    stages = [
        PipelineStage(build=SampleAndScore, arguments=arguments, pool=settings.models),
        PipelineStage(build=WriteUnit, arguments=written, pool=settings.writers),
    ]
    total = sum(item.unit.rows_read for item in items)
    finished = run(items, stages)
    return commit_stream(
        table, finished, bounds=settings.bounds, total=total, origin=origin, on_progress=on_progress
    )


def pending_units(
    settings: SamplesSettings,
    *,
    guidance: Sequence[float],
    captions: Sequence[Caption | Rejection],
    source: str,
    accounts: Iterable[UnitManifest],
    cuts: Cuts | None = None,
) -> Iterator[PromptRows]:
    """The units that no committed one covers, cut by cut and guidance by guidance.

    Raises:
        TableError: if a committed unit was drawn from other captions than those given.
    """
    known = list(accounts)
    for (cut, blocks), w in product({"": (), **(cuts or {})}.items(), guidance):
        name = source_name(source, w, cut=cut)
        for unit, rows in caption_units(
            captions, name=name, accounts=known, rows_per_unit=settings.rows_per_unit
        ):
            drawn = PromptRows(
                unit=unit,
                w=w,
                captions=[row for row in rows if isinstance(row, Caption)],
                rejections=[],
                cut=cut,
                without=tuple(blocks),
            )
            rejections = [
                replace(row, id=drawn.row_id(row.id), source=name)
                for row in rows
                if isinstance(row, Rejection)
            ]
            yield replace(drawn, rejections=rejections)


def recomputer(
    table: Snapshot, *, settings: SamplesSettings, model: str, decoder: str | None = None
) -> Recompute:
    """What `verify_table` needs to make units of SAMPLES again, from the captions and guidance in their rows.

    Raises:
        TableError: if the table was made by another model, decoder, other judges or other settings.
    """
    sampler = Sampler.parse(table.identity["sampler"])
    cuts = table.identity.get("cuts", {})
    wanted = identity_of(settings, sampler=sampler, bundle=load(model), cuts=cuts, decoder=decoder)
    told = {name: table.identity.get(name) for name in {*wanted, "decoder"}}
    if differing := list(differences(told, wanted)):
        raise TableError(f"{table.url} was made otherwise: {'; '.join(differing[:3])}")
    schema = samples_schema(
        features=settings.judging.feature_count, attributes=settings.judging.attribute_count
    )

    def make(account: UnitManifest, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if "not_finite" in account.rejected():
            raise CannotRecompute("rows that the model lost are not in it, and batches depend on them")
        captions = [
            Caption(id=row["source_id"], ordinal=0, text=row["caption"])
            for row in rows.select(["source_id", "caption"]).to_pylist()
        ]
        unit = Unit(**{name: getattr(account, name) for name in _UNIT_FIELDS}, name=account.unit)
        stage = SampleAndScore(
            model=model,
            sampler=sampler,
            drawing=settings.drawing,
            judging=settings.judging,
            device=Device(dtype=settings.device.dtype, threads=account.environment["threads"]),
            decoder=decoder,
        )
        w, cut = _parse_source_name(account.source)
        finished = stage(
            PromptRows(
                unit=unit, w=w, captions=captions, rejections=[], cut=cut, without=tuple(cuts.get(cut, ()))
            )
        )
        return pack(finished, schema), finished.environment

    return make


_WITHOUT = ".without."


def source_name(source: str, w: float, *, cut: str = "") -> str:
    """What units of a list at guidance `w` are named after; names sort as the guidance does.

    Args:
        source: name of the list.
        w: guidance.
        cut: the name of what the UNet goes without; empty if it is whole.

    Raises:
        ValueError: unless 1 <= w < 1000, in steps of 0.001.
    """
    if not 1.0 <= w < 1000.0 or round(w, 3) != w:
        raise ValueError(f"guidance is {w}; 1 to 999.999, in steps of 0.001, is accepted")
    return f"{source}{_WITHOUT}{cut}-w{w:07.3f}" if cut else f"{source}-w{w:07.3f}"


def _check_size(settings: SamplesSettings, *, bundle: Bundle) -> None:
    size, judged = settings.drawing.size or bundle.image_size, settings.judging.side
    check_size(size, step=bundle.granularity, option=_SIZE)
    if judged not in (None, size):
        raise SettingsError(
            f"{_SIZE} is {size}; the miniature's oracle reads pictures of {judged} px: draw such, or set "
            "samples.judging"
        )


def _parse_source_name(name: str) -> tuple[float, str]:
    """The guidance and the cut in a source's name."""
    rest, _, w = name.rpartition("-w")
    return float(w), rest.partition(_WITHOUT)[2]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was said of one model's pictures at one guidance, in order of the captions.

    Attributes:
        ids: of the captions.
        features: float32 [n,D].
        clip: float32 [n].
        right: 0 or 1 [n,5] uint8; None where no oracle read them.
    """

    ids: list[str]
    features: np.ndarray
    clip: np.ndarray
    right: np.ndarray | None


def read_scores(table: Snapshot, *, source: str, w: float, cut: str = "") -> Scores:
    """The rows of one caption list at one guidance by the UNet with one cut, in order of the list.

    Raises:
        TableError: if the table has none.
    """
    prefix = f"{source_name(source, w, cut=cut)}-"
    # Their names sort as the captions do.
    units = [file for file in table.units if file.unit.startswith(prefix)]
    if sum(file.rows for file in units) == 0:
        raise TableError(f"{table.url} has no rows of {source} at guidance {w:g}{cut and ' without '}{cut}")
    rows = pa.concat_tables([table.read_unit(file) for file in units])
    return Scores(
        ids=rows.column("source_id").to_pylist(),
        features=_array(rows, "features"),
        clip=rows.column("clip").to_numpy(),
        right=_array(rows, "right") if "right" in rows.column_names else None,
    )


def sampled_ids(table: Snapshot, *, source: str, w: float) -> list[str]:
    """The ids of the captions that were drawn at one guidance, in order of the list."""
    prefix = f"{source_name(source, w)}-"
    units = [file for file in table.units if file.unit.startswith(prefix)]
    columns = [table.read_unit(file, ["source_id"]).column("source_id") for file in units]
    return [id_ for column in columns for id_ in column.to_pylist()]


def _array(rows: pa.Table, name: str) -> np.ndarray:
    return array_type(rows.schema.field(name)).unpack(rows.column(name).to_pylist())
